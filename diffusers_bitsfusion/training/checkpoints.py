"""Checkpoints that are whole or not there: written beside, flushed, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import SAFE_WEIGHTS_NAME
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..qat import qat_layers
from .sharding import gathered, load_whole

_RUN_FILE = "run.json"
_STATE_FILE = "run.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def fingerprint(student: ModelMixin) -> str:
    """Tells prepared models apart: a hash of names, shapes, bits and some values of every parameter.

    To be taken before training, when the values are still those of the original model. Scales are computed, in their
    last bits by each machine its own way: of them counts how.
    """
    digest = hashlib.sha256()
    layers = qat_layers(student)
    digest.update(json.dumps({name: (layer.bits, layer.balance) for name, layer in layers.items()}).encode())
    if layers:
        config = student.qat_state.config
        digest.update(f"{config.scale_init} {config.scale_iterations}".encode())
    scales = {f"{name}.scale" for name in layers}
    for name, parameter in student.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if name in scales:
            continue
        digest.update(parameter.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
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
        total_limit: keep so many checkpoints, deleting the oldest.

    Raises:
        OSError: it cannot be written, for example to a full disk; earlier checkpoints are untouched.
    """
    target, partial = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        with _unwrapped_weights(accelerator):
            accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            torch.save(state, partial / _STATE_FILE)
            (partial / _RUN_FILE).write_text(json.dumps({"step": step, "settings": settings}, indent=2) + "\n")
            _flush(partial)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        earlier = checkpoints(folder)
        kept = f"{earlier[-1]} is complete; continue from it" if earlier else "There is no earlier one; start again"
        raise OSError(f"Could not save {target}: {error}. {kept} when there is room.") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in checkpoints(folder)[:-total_limit] if total_limit else []:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


@contextmanager
def _unwrapped_weights(accelerator: Accelerator) -> Iterator[None]:
    """Within it, accelerate saves and loads models whole and under their own names, without those of DDP and
    torch.compile around them.

    So a run can go on with another number of processes.
    """
    is_main = accelerator.is_main_process

    def plain(model: nn.Module) -> nn.Module:
        return accelerator.unwrap_model(model, keep_torch_compile=False)

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


def _flush(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def find_checkpoint(folder: Path, which: str | None) -> Path | None:
    """The checkpoint to continue from: the newest in `folder` for "latest" (None where there is none), or a path.

    Raises:
        FileNotFoundError: the path is no checkpoint.
    """
    if which is None:
        return None
    if which == "latest":
        return next(reversed(checkpoints(folder)), None)
    path = Path(which)
    if not (path / _RUN_FILE).is_file():
        raise FileNotFoundError(f"{path} is not a checkpoint of this training (it has no {_RUN_FILE}).")
    return path


def read_settings(path: Path) -> tuple[int, dict[str, Any]]:
    """(steps taken, settings) of a checkpoint."""
    run = json.loads((path / _RUN_FILE).read_text())
    return run["step"], run["settings"]


def load_checkpoint(accelerator: Accelerator, path: Path, settings: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Continue what `accelerator` prepared from a checkpoint.

    Returns:
        (steps taken, `state` as given to `save_checkpoint`, on the CPU).

    Raises:
        ValueError: it is of another model, stage, batch or seed; the message says which.
    """
    step, saved = read_settings(path)
    for key, value in settings.items():
        if saved.get(key) != value:
            raise ValueError(
                f"{path} cannot be continued: its {key} is {saved.get(key)!r}, this run's is {value!r}. "
                "Use the same settings, or another --output_dir."
            )
    with _unwrapped_weights(accelerator):
        accelerator.load_state(str(path))
    return step, torch.load(path / _STATE_FILE, map_location="cpu", weights_only=True)


def load_weights(student: nn.Module, path: Path, model: str) -> None:
    """Take only the weights of a checkpoint, averaged ones where it has them.

    Args:
        student: a prepared model.
        path: the checkpoint.
        model: `fingerprint` of the prepared model.

    Raises:
        ValueError: it is of another model.
    """
    _, settings = read_settings(path)
    if settings["model"] != model:
        raise ValueError(f"{path} is of another model: its fingerprint is {settings['model']!r}, not {model!r}.")
    student.load_state_dict(load_file(path / SAFE_WEIGHTS_NAME))
    ema = torch.load(path / _STATE_FILE, map_location="cpu", weights_only=True)["ema"]
    if ema is not None:
        average = EMAModel([])
        average.load_state_dict(ema)
        average.copy_to(student.parameters())
