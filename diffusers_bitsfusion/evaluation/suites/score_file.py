"""Scores on disk, so that an interrupted run goes on where it stopped, whatever the number of processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .base import Record, Scores

_SETTINGS = "settings.json"
_FEATURES = "features.npy"


class ScoreFile:
    """The records of a set of pictures, a JSON line each in a file for each process, and their features.

    Args:
        folder: made where it is missing; named by the settings, so that others' scores never lie there.
        settings: JSON-safe; all that the scores depend on.
        process: index of this process, which writes to a file of its own.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], process: int) -> None:
        self.folder = folder
        self._own = folder / f"records-{process}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def done(self) -> set[int]:
        """Return the places of the pictures that are scored."""
        return set(self._lines())

    def prepare(self, count: int, width: int) -> None:
        """Make the file of features for `count` pictures, but where it is there; one process does so first."""
        if width and not (self.folder / _FEATURES).is_file():
            np.lib.format.open_memmap(self.folder / _FEATURES, "w+", np.float32, (count, width)).flush()

    def append(self, indices: Sequence[int], records: Sequence[Record], features: np.ndarray | None) -> None:
        """Write the scores of some pictures; the records last, since they tell what is done."""
        if features is not None:
            mapped = np.lib.format.open_memmap(self.folder / _FEATURES, "r+")
            mapped[list(indices)] = features
            mapped.flush()
        lines = [json.dumps({"index": index} | dict(record)) for index, record in zip(indices, records, strict=True)]
        # What a killed process left of a line is ended, so that it is not the beginning of the next one.
        with open(self._own, "a", encoding="utf-8") as stream:
            stream.write("\n" + "\n".join(lines) + "\n")

    def scores(self) -> Scores:
        """Return the scores of all processes in the order of the pictures."""
        lines, path = self._lines(), self.folder / _FEATURES
        features = np.load(path, mmap_mode="r") if path.is_file() else None
        return Scores([lines[index] for index in sorted(lines)], features)

    def _lines(self) -> dict[int, Record]:
        found = {}
        for file in sorted(self.folder.glob("records-*.jsonl")):
            with open(file, encoding="utf-8") as stream:
                for text in stream:
                    if (record := _parse(text)) is not None:
                        found[record.pop("index")] = record
        return found


def _parse(text: str) -> Record | None:
    """Return the record of a line, None for an empty one and for one that a killed process did not finish."""
    try:
        return json.loads(text) if text.endswith("\n") and text.strip() else None
    except json.JSONDecodeError:
        return None
