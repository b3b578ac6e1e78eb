"""What the tests of training share: a folder of captioned images, and the losses of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

CAPTIONS = [f"a {letter}" for letter in "abcdefg"]


def write_images(folder: Path) -> None:
    """Write an image of 16 x 16 for each caption, as arrays."""
    images = np.random.default_rng(0).integers(0, 255, (len(CAPTIONS), 16, 16, 3), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    (folder / "captions.json").write_text(json.dumps({"captions": CAPTIONS}))


def losses(folder: Path) -> list[dict[str, float]]:
    """Return the entries of the losses of a stage."""
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
