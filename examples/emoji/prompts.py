"""The emoji's names as prompts for `bitsfusion evaluate`, and the scorer that finds the nearest emoji.

    python -m examples.emoji.prompts --out prompts.tsv
    bitsfusion evaluate PIPELINE --prompts prompts.tsv --scorer examples.emoji.prompts:score

The score has no learned part: a picture is right if, of all emoji of the set, the one that its prompt names is the
nearest by the mean squared difference of their pixels.
"""

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .data import SIZE, load


@functools.cache
def _flat_set() -> tuple[np.ndarray, dict[str, int]]:
    images, emojis = load()
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    return flat, {emoji.name: index for index, emoji in enumerate(emojis)}


def ranks(images: Sequence[np.ndarray | Image.Image], names: Sequence[str]) -> np.ndarray:
    """Return how many emoji of the set are nearer to each image than the one that it should show.

    Args:
        images: (64, 64, 3) uint8 each, or PIL images, which are brought to that size.
        names: the emoji that each should show.

    Returns:
        (n,) int64; 0 is right.

    Raises:
        KeyError: a name that is none of the set's.
    """
    flat, index = _flat_set()
    wanted = np.array([index[name] for name in names])
    pixels = np.stack([_as_pixels(image) for image in images]).reshape(len(wanted), -1)
    # The images' own squares are left out: they are the same for all emoji.
    distances = np.square(flat).sum(1) - 2 * pixels @ flat.T
    return (distances < distances[np.arange(len(wanted)), wanted, None]).sum(1)


def score(images: Sequence[np.ndarray | Image.Image], specs: Sequence[Mapping[str, str]]) -> list[bool]:
    """Return for each image whether the nearest emoji is the one of its specification, the file's parsed JSON."""
    return (ranks(images, [spec["name"] for spec in specs]) == 0).tolist()


def score_top5(images: Sequence[np.ndarray | Image.Image], specs: Sequence[Mapping[str, str]]) -> list[bool]:
    """Return for each image whether its emoji is among the five nearest."""
    return (ranks(images, [spec["name"] for spec in specs]) < 5).tolist()


def write_prompts(path: Path) -> None:
    """Write all names as tab-separated Prompt, Category and Spec (JSON); held-out ones in categories of their own."""
    lines = ["Prompt\tCategory\tSpec"]
    for emoji in load()[1]:
        theme = emoji.group.split("-")[0]
        category = f"new {theme}" if emoji.heldout else theme
        lines.append(f"{emoji.name}\t{category}\t{json.dumps({'name': emoji.name})}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _as_pixels(image: np.ndarray | Image.Image) -> np.ndarray:
    resized = Image.fromarray(np.asarray(image, dtype=np.uint8)).convert("RGB").resize((SIZE, SIZE))
    return np.asarray(resized, dtype=np.float32) / 255


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the emoji's names as a tab-separated file of prompts.")
    parser.add_argument("--out", type=Path, required=True)
    write_prompts(parser.parse_args().out)


if __name__ == "__main__":
    main()
