"""The training set on disk: rendered once, read as memory maps."""

import json
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .captions import sample_foil, sample_prompt
from .render import render
from .scenes import IMAGE_SIZE, sample_free_scene, sample_scene

# More of what is harder to learn.
CATEGORY_WEIGHTS = {
    "single_object": 0.06,
    "two_object": 0.22,
    "counting": 0.20,
    "colors": 0.08,
    "position": 0.20,
    "color_attr": 0.24,
}
PART = 10_000  # images drawn by one process in one go
FREE = 0.1  # share of the images, the last ones, without a caption: see `sample_free_scene`


def build_dataset(folder: Path, n: int, seed: int = 0) -> None:
    """Write `images.npy` (n, 64, 64, 3) uint8 and `captions.json` with a caption and a foil for each image.

    Those of free scenes are empty texts. All cores draw; the result does not depend on how many there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    captioned = n - round(FREE * n)
    shape = (n, IMAGE_SIZE, IMAGE_SIZE, 3)
    np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape).flush()
    parts = [range(start, min(start + PART, captioned)) for start in range(0, captioned, PART)]
    free_parts = [range(start, min(start + PART, n)) for start in range(captioned, n, PART)]
    # Fresh processes: a fork of one that has run torch's threads can hang.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        texts = [pool.submit(_draw_captioned, folder, part, seed) for part in parts]
        texts += [pool.submit(_draw_free, folder, part, seed) for part in free_parts]
        pairs = [pair for drawn in tqdm(texts, desc="scenes") for pair in drawn.result()]
    captions, foils = zip(*pairs, strict=True)
    # Last, so that a folder with captions is a complete one.
    (folder / "captions.json").write_text(json.dumps({"captions": captions, "foils": foils}))


def _draw_captioned(folder: Path, part: range, seed: int) -> list[tuple[str, str]]:
    """Draw the images of `part`; their captions and foils."""
    rng = random.Random(f"{seed} {part.start}")
    images = np.load(folder / "images.npy", mmap_mode="r+")
    texts = []
    for index in part:
        (category,) = rng.choices(tuple(CATEGORY_WEIGHTS), tuple(CATEGORY_WEIGHTS.values()))
        prompt = sample_prompt(rng, category)
        images[index] = render(sample_scene(rng, prompt.spec))
        texts.append((prompt.caption, sample_foil(rng, prompt).caption))
    images.flush()
    return texts


def _draw_free(folder: Path, part: range, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(f"{seed} {part.start}")
    images = np.load(folder / "images.npy", mmap_mode="r+")
    for index in part:
        images[index] = render(sample_free_scene(rng))
    images.flush()
    return [("", "")] * len(part)


def load_dataset(folder: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Images (n, 64, 64, 3) uint8 as a memory map, their captions, and one wrong caption for each.

    The last have none, empty texts instead.
    """
    texts = json.loads((folder / "captions.json").read_text())
    return np.load(folder / "images.npy", mmap_mode="r"), texts["captions"], texts["foils"]
