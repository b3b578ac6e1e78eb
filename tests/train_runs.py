"""What the tests of the training script share: captions of its data, and the losses of a run."""

from __future__ import annotations

import json
from pathlib import Path

CAPTIONS = [f"a {letter}" for letter in "abcdefg"]


def losses(folder: Path) -> list[dict[str, float]]:
    """Return the entries of the losses of a stage."""
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
