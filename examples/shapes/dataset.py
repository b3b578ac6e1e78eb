"""The training set on disk: rendered once, read as memory maps."""

import json
import random
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .captions import sample_foil, sample_prompt
from .render import render
from .scenes import IMAGE_SIZE, sample_free_scene, sample_scene

# More of what is harder to learn.
CATEGORY_WEIGHTS = {
    "single_object": 0.06,
    "two_object": 0.12,
    "counting": 0.28,
    "colors": 0.08,
    "position": 0.28,
    "color_attr": 0.18,
}
FREE = 0.1  # share of the images, the last ones, without a caption: see `sample_free_scene`


def build_dataset(folder: Path, n: int, seed: int = 0) -> None:
    """Write `images.npy` (n, 64, 64, 3) uint8 and `captions.json` with a caption and a foil for each image.

    Those of free scenes are empty texts.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    captioned = n - round(FREE * n)
    categories = rng.choices(tuple(CATEGORY_WEIGHTS), tuple(CATEGORY_WEIGHTS.values()), k=captioned)
    shape = (n, IMAGE_SIZE, IMAGE_SIZE, 3)
    images = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    captions, foils = [], []
    for index, category in enumerate(tqdm(categories, desc="scenes")):
        prompt = sample_prompt(rng, category)
        images[index] = render(sample_scene(rng, prompt.spec))
        captions.append(prompt.caption)
        foils.append(sample_foil(rng, prompt).caption)
    for index in tqdm(range(captioned, n), desc="free scenes"):
        images[index] = render(sample_free_scene(rng))
        captions.append("")
        foils.append("")
    images.flush()
    # Last, so that a folder with captions is a complete one.
    (folder / "captions.json").write_text(json.dumps({"captions": captions, "foils": foils}))


def load_dataset(folder: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Images (n, 64, 64, 3) uint8 as a memory map, their captions, and one wrong caption for each.

    The last have none, empty texts instead.
    """
    texts = json.loads((folder / "captions.json").read_text())
    return np.load(folder / "images.npy", mmap_mode="r"), texts["captions"], texts["foils"]
