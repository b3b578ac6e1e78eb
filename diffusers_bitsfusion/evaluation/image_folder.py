"""Drawn pictures on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..utils.errors import DamagedFileError
from ..utils.files import SETTINGS_FILE, claim_folder, replacing_file

_CLASH = "holds images of another run (other {})"


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
        claim_folder(self.folder, settings, kind=SETTINGS_FILE, clash=_CLASH, other="choose another folder")

    def missing(self, count: int) -> list[int]:
        """Return which of the first `count` pictures are not drawn yet."""
        drawn = {file.name for file in self.folder.iterdir()}
        return [index for index in range(count) if self._path(index).name not in drawn]

    def load(self, index: int) -> np.ndarray | None:
        """Return the picture, (height, width, 3) uint8, or None where it is not drawn yet.

        Raises:
            DamagedFileError: the file is no picture.
        """
        path = self._path(index)
        if not path.is_file():
            return None
        try:
            return np.asarray(Image.open(path).convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise DamagedFileError(path, f"is no picture ({error})", "Delete it, and it is drawn again.") from error

    def block(self, indices: Sequence[int]) -> np.ndarray:
        """Return drawn pictures of one size, as (n, height, width, 3) uint8."""
        return np.stack([np.asarray(Image.open(self._path(index)).convert("RGB")) for index in indices])

    def save(self, index: int, image: np.ndarray) -> None:
        """Write (height, width, 3) uint8; a file that is there is complete."""
        path = self._path(index)
        with replacing_file(path) as partial:
            Image.fromarray(image).save(partial, format="PNG")

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05}.png"
