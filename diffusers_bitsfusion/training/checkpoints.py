"""Checkpoints that are complete or absent: written beside their place, flushed, renamed."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import OPTIMIZER_NAME, RNG_STATE_NAME, SAFE_WEIGHTS_NAME, load
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..qat import qat_layers
from ..utils.errors import DamagedFileError, shown
from ..utils.files import file_checksum, flush_folder, flush_tree
from ..utils.fingerprints import hash_of_first_values, hash_of_settings
from ..utils.json_files import is_count, read_json
from ..utils.safetensors_files import read_header
from ..utils.torch_files import check_archive, is_finite_state, is_finite_tensor, read_torch
from .sharding import gathered, load_whole

_RUN_FILE = "run.json"
_STATE_FILE = "run.pt"
_REMEDY = "Continue from an earlier checkpoint."
_STAGE = re.compile(r"stage\d")
_NAME = re.compile(r"checkpoint-(\d+)")

# Moments of a parameter's shape: those of torch's AdamW, and of bitsandbytes' with 8 bits.
_MOMENTS = ({"exp_avg", "exp_avg_sq"}, {"state1", "state2"})


def fingerprint(student: ModelMixin) -> str:
    """Return a hash of names, shapes, bits and some values of every parameter, which identifies a prepared model.

    The hash is to be computed before training, when the values are still those of the original model. Scales are
    computed, with last bits that depend on the machine, so the hash covers how they are computed, not their values.
    """
    layers = qat_layers(student)
    beginning = json.dumps({name: (layer.bits, layer.balance) for name, layer in layers.items()})
    if layers:
        config = student.qat_state.config
        beginning += f"{config.scale_init} {config.scale_iterations}"
    scales = {f"{name}.scale" for name in layers}
    parameters = student.named_parameters()
    return hash_of_first_values(beginning, ((name, tensor, name not in scales) for name, tensor in parameters))


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    found = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    state: dict[str, Any],
    settings: dict[str, Any],
    total_limit: int | None = None,
) -> Path:
    """Write `folder/checkpoint-STEP`; every process calls it.

    Args:
        accelerator: what it prepared is saved: model, optimizer, gradient scaler, states of random generators.
        folder: of the stage.
        step: steps taken.
        state: further tensors and numbers, the same on all processes.
        settings: what a run that continues must agree in; JSON-safe.
        total_limit: keep so many checkpoints, deleting the oldest; None or a number below 1 keeps all.

    Raises:
        OSError: it cannot be written, for example to a full disk; earlier checkpoints are untouched.
    """
    target, partial = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.partial"
    if accelerator.is_main_process:
        # Runs that were killed while they saved have left these.
        for leftover in folder.glob(".checkpoint-*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        with _unwrapped_weights(accelerator):
            accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()  # Each process has its own file of random states.
        if accelerator.is_main_process:
            torch.save(state, partial / _STATE_FILE)
            checksums = {file.name: file_checksum(file) for file in sorted(partial.iterdir()) if file.is_file()}
            run = {"step": step, "settings": settings, "files": checksums}
            run["checksum"] = hash_of_settings(run)
            (partial / _RUN_FILE).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
            flush_tree(partial)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        earlier = checkpoints(folder)
        kept = f"{earlier[-1]} is complete; continue from it" if earlier else "There is no earlier one; start again"
        raise OSError(f"Could not save {target}: {error}. {kept} when there is room.") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        flush_folder(folder)
        for old in checkpoints(folder)[:-total_limit] if total_limit is not None and total_limit > 0 else []:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


@contextmanager
def _unwrapped_weights(accelerator: Accelerator) -> Iterator[None]:
    """Let accelerate save and load models whole and under their own names, within this context.

    Names are without those of DDP and torch.compile, so that a run can continue with another number of processes.
    """
    is_main = accelerator.is_main_process

    def plain(model: nn.Module) -> nn.Module:
        unwrapped: nn.Module = accelerator.unwrap_model(model, keep_torch_compile=False)
        return unwrapped

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        for model, _ in zip(models, list(weights), strict=False):
            state = gathered(dict(plain(model).state_dict()), keep=is_main)
            if is_main:
                save_file(state, Path(folder) / SAFE_WEIGHTS_NAME)
            weights.pop()

    def load(models: list[nn.Module], folder: str) -> None:
        while models:
            load_whole(plain(models.pop()), load_file(Path(folder) / SAFE_WEIGHTS_NAME))

    hooks = accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def find_checkpoint(folder: Path, which: str | None) -> Path | None:
    """Return the checkpoint to continue from.

    Args:
        folder: of a run, or of one of its stages.
        which: "latest", the newest in `folder`; a path; or the name of a checkpoint in `folder` or in a stage's folder
            of the same run, the last stage first.

    Returns:
        Its folder; None where `which` is None, or "latest" and there is none.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    if which is None:
        return None
    if which == "latest":
        return next(reversed(checkpoints(folder)), None)
    run = folder.parent if _STAGE.fullmatch(folder.name) else folder
    stages = sorted((path for path in run.glob("stage*") if _STAGE.fullmatch(path.name)), reverse=True)
    candidates = [Path(which), *(place / which for place in (folder, *stages))]
    found = next((path for path in candidates if (path / _RUN_FILE).is_file()), None)
    if found is None:
        have = ", ".join(f"{place.name}/{path.name}" for place in stages for path in checkpoints(place))
        raise FileNotFoundError(
            f"{which} is not a checkpoint of this training (it has no {_RUN_FILE}). {run} has {have or 'none'}."
        )
    return found


def read_settings(path: Path) -> tuple[int, dict[str, Any]]:
    """Return (steps taken, settings) of a checkpoint.

    Raises:
        DamagedFileError: its file of settings is damaged.
    """
    run = read_json(path / _RUN_FILE, remedy=_REMEDY)
    if not is_count(run.get("step")) or not isinstance(run.get("settings"), dict):
        raise DamagedFileError(path / _RUN_FILE, "is damaged: it must have step, a count, and settings", _REMEDY)
    checksum = run.pop("checksum", None)
    is_older = checksum is None and run.keys() == {"step", "settings"}
    if not is_older and checksum != hash_of_settings(run):
        raise DamagedFileError(path / _RUN_FILE, "is damaged: its checksum does not fit", _REMEDY)
    return run["step"], run["settings"]


def load_checkpoint(accelerator: Accelerator, path: Path, settings: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Continue what `accelerator` prepared from a checkpoint.

    Returns:
        (steps taken, `state` as given to `save_checkpoint`, on the CPU).

    Raises:
        ValueError: it is of another model, stage, batch or seed, the message says which; or a file of it is damaged.
    """
    step, saved = read_settings(path)
    for key, value in settings.items():
        if saved.get(key) != value:
            raise ValueError(
                f"{path} cannot be continued: its {key} is {saved.get(key)!r}, this run's is {value!r}. "
                "Use the same settings, or another --output_dir."
            )
    _check_files(path)
    state = _read_state(path)
    try:
        with _unwrapped_weights(accelerator):
            accelerator.load_state(str(path))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch and accelerate raise any error for files of another training.
        problem = f"cannot be loaded ({type(error).__name__}: {shown(str(error))})"
        raise DamagedFileError(path, problem, _REMEDY) from error
    return step, state


def check_moments(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what a checkpoint gave an optimizer where its first step would fail.

    Args:
        path: the checkpoint.
        optimizer: that of `make_optimizer`, after loading.

    Raises:
        DamagedFileError: moments of a parameter are missing, or have another shape than it.
    """
    file = path / f"{OPTIMIZER_NAME}.bin"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        if parameter not in optimizer.state:  # It has had no gradient yet.
            continue
        state = optimizer.state[parameter]
        moments = next((names for names in _MOMENTS if names <= state.keys()), set())
        if not moments or any(getattr(state[name], "shape", None) != parameter.shape for name in moments):
            problem = f"is damaged: a parameter of shape {tuple(parameter.shape)} has no moments of that shape"
            raise DamagedFileError(file, problem, _REMEDY)


def _check_files(path: Path) -> None:
    """Compare the files of a checkpoint with the checksums that it has of them, which older ones have not.

    Raises:
        DamagedFileError: a file is missing, damaged or changed, or holds NaN or infinite values.
    """
    expected = read_json(path / _RUN_FILE, remedy=_REMEDY).get("files", {})
    if not isinstance(expected, dict):
        raise DamagedFileError(path / _RUN_FILE, "is damaged: files must be an object", _REMEDY)
    for name, checksum in expected.items():
        if Path(name).name != name or not (path / name).is_file():
            raise DamagedFileError(path / name, "is missing", _REMEDY)
        if file_checksum(path / name) != checksum:
            raise DamagedFileError(path / name, "is damaged: its checksum does not fit", _REMEDY)
    for file in sorted(path.iterdir()):
        if file.suffix == ".safetensors":
            _check_weights(file)
        elif file.suffix == ".bin":  # accelerate copies the optimizer and the schedule as they are.
            _refuse_unless_finite(file, is_finite_state(read_torch(file, _REMEDY, mmap=True)))
        elif file.suffix in (".pt", ".pkl"):
            check_archive(file, _REMEDY)
            if file.name.startswith(f"{RNG_STATE_NAME}_"):
                _check_random_states(file)


def _check_weights(file: Path) -> None:
    read_header(file)
    with safe_open(file, framework="pt") as stream:
        for name in stream.keys():  # noqa: SIM118 - it is no dict.
            _refuse_unless_finite(file, is_finite_tensor(stream.get_tensor(name)))


def _refuse_unless_finite(file: Path, finite: bool) -> None:
    if not finite:
        raise DamagedFileError(file, "holds NaN or infinite values, from which no training goes on", _REMEDY)


def _check_random_states(file: Path) -> None:
    """Refuse states of generators that cannot be set: accelerate goes on with other random numbers, without a word."""
    try:
        states = load(file)
        random.Random().setstate(states["random_state"])
        np.random.RandomState().set_state(states["numpy_random_seed"])
        torch.Generator().set_state(states["torch_manual_seed"])
    except Exception as error:  # Generators raise any error for what is no state of theirs.
        problem = f"is damaged: it holds no states of random generators ({type(error).__name__})"
        raise DamagedFileError(file, problem, _REMEDY) from error


def _read_state(path: Path) -> dict[str, Any]:
    state = read_torch(path / _STATE_FILE, _REMEDY)
    if not isinstance(state, dict) or not isinstance(state.get("lr_scheduler"), dict) or "ema" not in state:
        raise DamagedFileError(path / _STATE_FILE, "is damaged: it must have lr_scheduler and ema", _REMEDY)
    _refuse_unless_finite(path / _STATE_FILE, is_finite_state(state))
    return state


def load_weights(student: nn.Module, path: Path, model: str) -> None:
    """Load only the weights of a checkpoint, averaged ones where it has them.

    Args:
        student: a prepared model.
        path: the checkpoint.
        model: `fingerprint` of the prepared model.

    Raises:
        ValueError: it is of another model.
    """
    _, settings = read_settings(path)
    found = settings.get("model")
    if found != model:
        raise ValueError(f"{path} is of another model: its fingerprint is {shown(found)}, not {model!r}.")
    _check_files(path)
    ema = _read_state(path)["ema"]
    try:
        student.load_state_dict(load_file(path / SAFE_WEIGHTS_NAME))
        if ema is not None:
            average = EMAModel([])
            average.load_state_dict(ema)
            average.copy_to(student.parameters())
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise DamagedFileError(path, f"does not fit the model ({shown(str(error))})", _REMEDY) from error
