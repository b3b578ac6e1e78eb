"""How long sampling and calibration will take, from a trial of two steps and of one layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..codec.rounding import Rounding
from ..config.calibration import Calibration
from ..utils.durations import as_duration
from ..utils.processes import process_state
from .denoising import Denoising
from .layers import quantize_layer
from .moments import InputMoments
from .passes import plan_passes
from .tuning import CALLS

# Number of inference steps of a trial: the first call may compile and allocate, so that the last one counts.
_TRIAL_STEPS = 2
# Time of a call with gradients, relative to one without, gains and offsets included: 2.5 to 3 on the shapes pipeline.
GRADIENTS = 2.8


@dataclass(frozen=True)
class SamplingTime:
    """Time of sampling one batch.

    Attributes:
        once: seconds of everything but the calls of the model: text encoder, VAE.
        call: seconds of a call of the model with the scheduler's step.
        order: number of calls in a step.
        more_calls: number of calls beside those: PNDM makes one more, Heun's method one less.
    """

    once: float
    call: float
    order: int
    more_calls: int

    def seconds(self, steps: int) -> float:
        """Return the seconds of a batch of `steps` inference steps."""
        return self.once + (steps * self.order + self.more_calls) * self.call


def time_sampling(pipeline: DiffusionPipeline, model: nn.Module, sample: Callable[[int], Any]) -> SamplingTime:
    """Time a batch of two steps.

    Args:
        pipeline: pipeline that samples.
        model: its component that is called in every step.
        sample: samples a batch in the given number of steps.
    """
    device = next(model.parameters()).device
    ends: list[float] = []
    hook = model.register_forward_hook(lambda *_: ends.append(now(device)))
    start = now(device)
    try:
        sample(_TRIAL_STEPS)
    finally:
        hook.remove()
    call, order = ends[-1] - ends[-2], pipeline.scheduler.order
    once = now(device) - start - len(ends) * call
    return SamplingTime(max(0.0, once), call, order, len(ends) - order * _TRIAL_STEPS)


def now(device: torch.device) -> float:
    """Return the time in seconds, when all that the device was given to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class CalibrationTime:
    """Estimated seconds of a calibration.

    Attributes:
        sampling: seconds of sampling and of gathering moments.
        rounding: seconds of rounding the layers.
        tuning: seconds of tuning, and of recording what it learns from.
    """

    sampling: float
    rounding: float
    tuning: float

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return self.sampling + self.rounding + self.tuning

    def __str__(self) -> str:
        parts = [(name, getattr(self, name)) for name in ("sampling", "rounding", "tuning")]
        told = ", ".join(f"{name} {as_duration(seconds)}" for name, seconds in parts if seconds)
        return f"Calibration takes about {as_duration(self.total)}: {told}."


def estimate_time(
    pipeline: DiffusionPipeline,
    model: ModelMixin,
    bits: Mapping[str, int],
    calibration: Calibration,
    rounding: Rounding = Rounding(),
) -> CalibrationTime:
    """Estimate the time of a whole calibration, by the arguments of `calibrate`, from a trial that changes nothing."""
    layers = {name: model.get_submodule(name) for name in bits}
    passes = plan_passes(layers, calibration.memory_gb * 1e9)
    processes = process_state().num_processes
    denoising = Denoising(pipeline, model, calibration)
    trial = _partial_run(denoising)
    names = passes.groups[0]
    moments = {name: InputMoments(layers[name], passes.max_columns) for name in names}
    batch = time_sampling(pipeline, model, lambda steps: trial(steps, moments))
    runs = -(-denoising.num_batches // processes)
    steps = calibration.num_inference_steps

    by_size = sorted(names, key=lambda name: layers[name].weight.numel())
    for chosen in (by_size[0], by_size[len(by_size) // 2]):  # The first call loads kernels.
        device = layers[chosen].weight.device
        start = now(device)
        quantize_layer(layers[chosen], moments[chosen], bits[chosen], rounding)
        seconds = now(device) - start
    weights = sum(layer.weight.numel() for layer in layers.values())
    rounded = seconds * weights / layers[chosen].weight.numel() / processes

    tuning = 0.0
    if calibration.tuning_steps:
        plain = time_sampling(pipeline, model, lambda steps: trial(steps, {}))
        calls = calibration.tuning_steps * CALLS
        tuning = runs * plain.seconds(steps) + (1 / processes + GRADIENTS) * calls * plain.call
    return CalibrationTime(len(passes.groups) * runs * batch.seconds(steps), rounded, tuning)


def _partial_run(denoising: Denoising) -> Callable[[int, Mapping[str, InputMoments]], None]:
    """Return a function that samples the first batch in so many steps, and adds to the given moments."""

    def run(steps: int, moments: Mapping[str, InputMoments]) -> None:
        settings = replace(denoising.calibration, num_inference_steps=steps)
        short = Denoising(denoising.pipeline, denoising.model, settings)
        short.gather(0, moments, on_call=lambda: None)

    return run
