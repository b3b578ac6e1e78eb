"""Drawn pictures on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_SETTINGS = "settings.json"


class ImageFolder:
    """One PNG a prompt, and the settings that they were drawn with.

    Args:
        folder: made where it is missing.
        settings: JSON-safe; all that the pictures depend on.

    Raises:
        ValueError: the folder holds pictures of other settings, or anything that is not ours.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / _SETTINGS
        if note.is_file():
            found = json.loads(note.read_text(encoding="utf-8"))
            changed = sorted(key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key))
            if changed:
                raise ValueError(
                    f"{self.folder} holds images of another run (other {', '.join(changed)}); "
                    "delete it or choose another folder."
                )
        elif any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and holds no {_SETTINGS}; choose another folder.")
        else:
            note.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def missing(self, count: int) -> list[int]:
        """Return which of the first `count` pictures are not drawn yet."""
        drawn = {file.name for file in self.folder.iterdir()}
        return [index for index in range(count) if self._path(index).name not in drawn]

    def load(self, index: int) -> np.ndarray | None:
        """(height, width, 3) uint8, or None where it is not drawn yet."""
        path = self._path(index)
        return np.asarray(Image.open(path).convert("RGB")) if path.is_file() else None

    def block(self, indices: Sequence[int]) -> np.ndarray:
        """Return drawn pictures of one size, as (n, height, width, 3) uint8."""
        return np.stack([np.asarray(Image.open(self._path(index)).convert("RGB")) for index in indices])

    def save(self, index: int, image: np.ndarray) -> None:
        """Write (height, width, 3) uint8; a file that is there is complete."""
        path = self._path(index)
        partial = path.with_suffix(".part")
        Image.fromarray(image).save(partial, format="PNG")
        os.replace(partial, path)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05}.png"
