"""What a calibration has done, on disk, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .calls import Call
from .layers import CalibratedLayer
from .moments import InputMoments

_SETTINGS = "settings.json"


class CalibrationFolder:
    """Moments of the pass under way, and the layers that are finished.

    Every file is complete or not there, and belongs to one process, since each has its own share of the work.

    Args:
        folder: made where it is missing.
        settings: JSON-safe; all that the results depend on.
        process: number of this process.

    Raises:
        ValueError: the folder holds another calibration, or files that are not ours.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any], process: int):
        self._folder = Path(folder)
        self._process = process
        self._folder.mkdir(parents=True, exist_ok=True)
        note = self._path(_SETTINGS)
        if note.is_file():
            found = json.loads(note.read_text(encoding="utf-8"))
            changed = sorted(key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key))
            if changed:
                raise ValueError(
                    f"{self._folder} holds a calibration with other {', '.join(changed)}; delete it, or choose "
                    "another cache_dir."
                )
        elif any(self._folder.iterdir()) and not any(self._folder.glob(f"*{_SETTINGS}*")):
            raise ValueError(f"{self._folder} is not empty and holds no calibration; choose another cache_dir.")
        else:
            partial = note.with_name(note.name + ".part")
            partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, note)

    def save_moments(self, index: int, batches: int, moments: Mapping[str, InputMoments]) -> None:
        """Keep what pass `index` has gathered in its first `batches` batches, in place of what it had kept before."""
        states = {name: moment.state_dict() for name, moment in moments.items()}
        self._save(f"pass{index}.pt", {"batches": batches, "moments": states})

    def load_moments(self, index: int, moments: Mapping[str, InputMoments]) -> int:
        """Fill `moments` with what pass `index` has kept; the number of batches in it, 0 where it has kept nothing."""
        path = self._path(f"pass{index}.pt")
        if not path.is_file():
            return 0
        saved = torch.load(path, weights_only=True, mmap=True)
        for name, moment in moments.items():
            moment.load_state_dict(saved["moments"][name])
        return saved["batches"]

    def drop_moments(self, index: int) -> None:
        """Give back the space of pass `index`, whose layers are finished."""
        self._path(f"pass{index}.pt").unlink(missing_ok=True)

    def save_layer(self, name: str, layer: CalibratedLayer) -> None:
        self._save(f"{name}.layer.pt", asdict(layer))

    def load_layer(self, name: str) -> CalibratedLayer | None:
        """The finished layer, on the CPU, or None."""
        path = self._path(f"{name}.layer.pt")
        return CalibratedLayer(**torch.load(path, weights_only=True, map_location="cpu")) if path.is_file() else None

    def _save(self, name: str, content: Mapping[str, Any]) -> None:
        _save(self._path(name), content)

    def _path(self, name: str) -> Path:
        return self._folder / f"{self._process}-{name}"


class TuningFolder:
    """Recorded calls and the state of tuning, in the folder of a calibration that has finished.

    Args:
        folder: of the calibration.
        steps: of tuning.
        timesteps: that calls are restricted to; None for all. What others, or other steps, have left is not looked at.
    """

    def __init__(self, folder: str | os.PathLike[str], steps: int, timesteps: Sequence[float] | None):
        known = "" if timesteps is None else f"-{zlib.crc32(repr(sorted(timesteps)).encode()):08x}"
        self._folder = Path(folder) / f"tuning{steps}{known}"
        self._folder.mkdir(exist_ok=True)
        self._state = self._folder / "state.pt"

    def save_calls(self, batch: int, calls: Sequence[Call]) -> None:
        _save(self._calls(batch), [call.parts for call in calls])

    def load_calls(self, batch: int) -> list[Call] | None:
        """The calls of a batch, or None where it has not been drawn."""
        path = self._calls(batch)
        return [Call(*call) for call in torch.load(path, weights_only=True)] if path.is_file() else None

    def save_state(self, state: Mapping[str, Any]) -> None:
        _save(self._state, state)

    def load_state(self) -> Mapping[str, Any] | None:
        return torch.load(self._state, weights_only=True) if self._state.is_file() else None

    def _calls(self, batch: int) -> Path:
        return self._folder / f"calls{batch}.pt"


def _save(path: Path, content: Any) -> None:
    partial = path.with_name(path.name + ".part")
    torch.save(content, partial)
    os.replace(partial, path)
