"""Pipelines to evaluate: loaded with their defects named, and told apart by their files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoModel, DiffusionPipeline

DENOISERS = ("unet", "transformer")  # a pipeline's component that predicts the noise has one of these names


def default_device() -> torch.device:
    """CUDA where there is a device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """What computes fast on a device and is exact enough: float32 on a CPU, float16 elsewhere."""
    return torch.float32 if device.type == "cpu" else torch.float16


def load_pipeline(
    path: str | os.PathLike[str],
    scheduler: str | None = None,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str | None = None,
    unet: str | os.PathLike[str] | None = None,
) -> DiffusionPipeline:
    """A pipeline, packed or in full precision, on the default device or another.

    A safety checker is taken off: the black pictures that it puts in place would be measured as the model's.

    Args:
        path: folder or Hub id.
        scheduler: name of a diffusers scheduler to use with the pipeline's own noise schedule.
        dtype: of what is in floating point; when left out, `default_dtype` of the device.
        device: where it computes; when left out, `default_device`.
        unet: folder or Hub id of a UNet or transformer in place of the pipeline's own.

    Raises:
        OSError: nothing to load there.
        ValueError: no pipeline, or one without UNet or transformer; unknown scheduler.
    """
    path = os.fspath(path)
    check_pipeline(path)
    device = default_device() if device is None else torch.device(device)
    dtype = dtype or default_dtype(device)
    pipeline = DiffusionPipeline.from_pretrained(path, dtype=dtype)
    if unet is not None:
        replace_denoiser(pipeline, unet, dtype)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None
    if scheduler is not None:
        pipeline.scheduler = _scheduler_class(scheduler).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    # In float16 a CPU is slow, but computes, which diffusers' warning denies.
    return pipeline.to(device, silence_dtype_warnings=True)


def replace_denoiser(pipeline: DiffusionPipeline, source: str | os.PathLike[str], dtype: torch.dtype) -> None:
    """Give a pipeline the UNet or transformer in a folder or on the Hub in place of its own.

    Raises:
        OSError: nothing to load there.
        ValueError: it is of another class than the pipeline's.
    """
    name = next(name for name in DENOISERS if getattr(pipeline, name, None) is not None)
    model = AutoModel.from_pretrained(os.fspath(source), dtype=dtype)
    own = type(getattr(pipeline, name)).__name__
    if type(model).__name__ != own:
        raise ValueError(f"{source} is of {type(model).__name__}, the pipeline's own {name} of {own}.")
    pipeline.register_modules(**{name: model})


def scheduler_name(path: str | os.PathLike[str], scheduler: str | None = None) -> str:
    """Return the class name of the scheduler that `load_pipeline` with these arguments would take.

    Raises:
        OSError, ValueError: as of `load_pipeline`.
    """
    index = check_pipeline(os.fspath(path))
    return index["scheduler"][1] if scheduler is None else _scheduler_class(scheduler).__name__


def check_pipeline(path: str) -> dict[str, Any]:
    """Return the pipeline's index; name what is wrong before diffusers lists every part that it did not get.

    Raises:
        OSError: nothing to load there.
        ValueError: no pipeline, or one without UNet or transformer.
    """
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise ValueError(f"{path} holds no pipeline (no model_index.json).")
    index = DiffusionPipeline.load_config(path)
    names = [name for name in DENOISERS if (index.get(name) or [None])[0]]
    if not names:
        raise ValueError(f"The pipeline {path} has neither a UNet nor a transformer.")
    missing = [name for name in names if Path(path).is_dir() and not (Path(path) / name).is_dir()]
    if missing:
        raise ValueError(f"The pipeline {path} names a {missing[0]}, but its folder {missing[0]}/ is missing.")
    return index


def _scheduler_class(name: str) -> type[diffusers.SchedulerMixin]:
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise ValueError(f"{name!r} is not a diffusers scheduler.")
    return found
