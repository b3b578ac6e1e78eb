"""Results of a calibration on disk, so that an interrupted one continues where it stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..codec.radix import dense_width
from ..utils.crc32 import crc32
from ..utils.errors import DamagedFileError
from ..utils.files import claim_folder, refuse_foreign_files, replacing_file
from ..utils.json_files import is_count, is_number
from ..utils.locks import FolderLock
from ..utils.torch_files import is_finite_state, is_finite_tensor, read_torch, tensors_of
from .calls import Call
from .layers import CalibratedLayer
from .moments import InputMoments

# Words of messages, see `claim_folder`: content of the folder, other settings, advice.
_KIND, _CLASH, _OTHER = "calibration", "holds a calibration with other {}", "choose another cache_dir"


@contextmanager
def using_alone(folder: str | os.PathLike[str] | None, process: int) -> Iterator[None]:
    """Keep a second calibration out of the folder; processes of one calibration have a lock each.

    Args:
        folder: folder of the calibration, made where it is missing; None where nothing is kept.
        process: number of this process.

    Raises:
        ValueError: the folder holds files but no calibration.
        FolderInUseError: another calibration is using the folder.
    """
    if folder is None:
        yield
        return
    refuse_foreign_files(Path(folder), _KIND, _OTHER)
    lock = FolderLock(Path(folder) / f".{process}.lock", f"Wait until it is done, or {_OTHER}.")
    try:
        yield
    finally:
        lock.release()


class CalibrationFolder:
    """Folder with the moments of the current pass and the finished layers.

    Every file is complete or missing, and belongs to one process, since each has its own share of the work.

    Args:
        folder: folder, made where it is missing.
        settings: JSON-safe settings that the results depend on.
        process: number of this process.

    Raises:
        ValueError: the folder holds another calibration, or files but no calibration.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any], process: int) -> None:
        self._folder = Path(folder)
        self._process = process
        claim_folder(self._folder, settings, kind=_KIND, clash=_CLASH, other=_OTHER, prefix=f"{process}-")

    @property
    def is_new(self) -> bool:
        """Whether nothing of the calibration is kept yet."""
        return not any(self._folder.glob("*.pt"))

    def save_moments(self, index: int, batches: int, moments: Mapping[str, InputMoments]) -> None:
        """Save the moments of pass `index` after its first `batches` batches, in place of earlier ones."""
        states = {name: moment.state_dict() for name, moment in moments.items()}
        _save(self._path(f"pass{index}.pt"), {"batches": batches, "moments": states})

    def load_moments(self, index: int, moments: Mapping[str, InputMoments], max_batches: int) -> int:
        """Load the saved moments of pass `index`.

        Args:
            index: number of the pass.
            moments: moments by layer, changed in place; left unchanged if any of the saved ones is damaged.
            max_batches: number of batches of the pass.

        Returns:
            Number of batches in the saved moments; 0 where none are saved.

        Raises:
            DamagedFileError: the file is damaged, not finite, or of other layers.
        """
        path = self._path(f"pass{index}.pt")
        if not path.is_file():
            return 0
        remedy = "Delete it: its pass is then run again."
        saved = read_torch(path, remedy, mmap=True)
        if not (isinstance(saved, dict) and saved.keys() == {"batches", "moments"} and is_count(saved["batches"])):
            raise DamagedFileError(path, "is damaged: it does not hold batches and moments", remedy)
        if saved["batches"] > max_batches or not isinstance(saved["moments"], dict):
            raise DamagedFileError(path, f"is damaged: it counts {saved['batches']} batches of {max_batches}", remedy)
        for name, moment in moments.items():
            if not moment.is_state(saved["moments"].get(name)):
                raise DamagedFileError(
                    path, f"is damaged: the moments of {name} are missing, of other shapes or not finite", remedy
                )
        for name, moment in moments.items():
            moment.load_state_dict(saved["moments"][name])
        batches: int = saved["batches"]
        return batches

    def drop_moments(self, index: int) -> None:
        """Remove the moments of pass `index`, whose layers are finished."""
        self._path(f"pass{index}.pt").unlink(missing_ok=True)

    def save_layer(self, name: str, layer: CalibratedLayer) -> None:
        """Save a finished layer."""
        _save(self._path(f"{name}.layer.pt"), asdict(layer))

    def load_layer(self, name: str, layer: nn.Linear | nn.Conv2d, bits: int) -> CalibratedLayer | None:
        """Load a finished layer.

        Args:
            name: name of the layer.
            layer: float layer.
            bits: number of bits of the layer.

        Returns:
            Calibrated layer with tensors on the CPU; None where it is not finished.

        Raises:
            DamagedFileError: the file is damaged, or of a layer of another shape.
        """
        path = self._path(f"{name}.layer.pt")
        if not path.is_file():
            return None
        remedy = "Delete it: the layer is then rounded again."
        saved = read_torch(path, remedy)
        rows, columns = layer.weight.shape[0], layer.weight[0].numel()
        if not (
            isinstance(saved, dict)
            and saved.keys() == {"codes", "scale", "bias"}
            and is_finite_tensor(saved["codes"], torch.uint8, (rows, dense_width(columns, bits)))
            and is_finite_tensor(saved["scale"], torch.float32, (rows,))
            and bool((saved["scale"] > 0).all())
            and (saved["bias"] is None) == (layer.bias is None)
            and (saved["bias"] is None or is_finite_tensor(saved["bias"], torch.float32, (rows,)))
        ):
            raise DamagedFileError(path, f"is damaged: it does not hold {name} at {bits} bits", remedy)
        return CalibratedLayer(**saved)

    def _path(self, name: str) -> Path:
        return self._folder / f"{self._process}-{name}"


class TuningFolder:
    """Folder with the recorded calls and the state of tuning, within that of a calibration that has finished.

    Files of tuning by other steps or timesteps are ignored.

    Args:
        folder: folder of the calibration.
        steps: number of steps of tuning.
        timesteps: timesteps that calls are restricted to; None for all.
    """

    def __init__(self, folder: str | os.PathLike[str], steps: int, timesteps: Sequence[float] | None) -> None:
        known = "" if timesteps is None else f"-{crc32(repr(sorted(timesteps)).encode()):08x}"
        self._folder = Path(folder) / f"tuning{steps}{known}"
        self._folder.mkdir(exist_ok=True)
        self._state = self._folder / "state.pt"
        self._steps = steps

    def save_calls(self, batch: int, calls: Sequence[Call]) -> None:
        """Save the calls of a batch."""
        _save(self._calls(batch), [call.parts for call in calls])

    def load_calls(self, batch: int) -> list[Call] | None:
        """Load the calls of a batch; return None where they have not been recorded.

        Raises:
            DamagedFileError: the file is damaged, or holds values that are not finite.
        """
        path = self._calls(batch)
        if not path.is_file():
            return None
        remedy = "Delete it: its batch is then sampled again."
        saved = read_torch(path, remedy)
        if not (isinstance(saved, list) and saved and all(_is_call(call) for call in saved)):
            raise DamagedFileError(path, "is damaged: it does not hold finite calls of a model", remedy)
        return [Call(*call) for call in saved]

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Save the state of tuning, in place of an earlier one."""
        _save(self._state, state)

    def load_state(self) -> Mapping[str, Any] | None:
        """Load the state of tuning; return None where there is none.

        Raises:
            DamagedFileError: the file is damaged, or holds values that are not finite.
        """
        if not self._state.is_file():
            return None
        remedy = "Delete it: tuning then begins again."
        state = read_torch(self._state, remedy)
        if not (isinstance(state, dict) and _is_tuning_state(state, self._steps)):
            raise DamagedFileError(self._state, f"is damaged: it is no state of {self._steps} steps of tuning", remedy)
        return state

    def _calls(self, batch: int) -> Path:
        return self._folder / f"calls{batch}.pt"


def _save(path: Path, content: Any) -> None:
    with replacing_file(path) as partial:
        torch.save(content, partial)


def _is_call(call: Any) -> bool:
    """Return whether a value is `Call.parts` with finite tensors; arguments may hold infinity."""
    if not isinstance(call, tuple) or len(call) != 6:
        return False
    args, kwargs, output, guidance, shared, rows = call
    return (
        isinstance(args, tuple)
        and all(isinstance(named, dict) and all(isinstance(name, str) for name in named) for named in (kwargs, shared))
        and is_finite_tensor(output)
        and (guidance is None or is_finite_tensor(guidance))
        and (rows is None or is_finite_tensor(rows, torch.int64, output.shape[:1]))
        and not any(bool(torch.isnan(tensor).any()) for tensor in tensors_of((args, kwargs, shared)))
    )


def _is_tuning_state(state: Mapping[str, Any], steps: int) -> bool:
    return (
        state.keys() == {"step", "spreads", "values", "optimizer", "surplus"}
        and is_count(state["step"])
        and state["step"] <= steps
        and isinstance(state["spreads"], list)
        and all(spread is None or is_number(spread) for spread in state["spreads"])
        and isinstance(state["values"], list)
        and all(is_finite_tensor(value, torch.float32) for value in state["values"])
        and isinstance(state["optimizer"], dict)
        and state["optimizer"].keys() == {"state", "param_groups"}
        and is_finite_state((state["optimizer"], state["surplus"]))
    )
