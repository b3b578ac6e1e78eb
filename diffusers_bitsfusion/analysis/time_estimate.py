"""How long an analysis will take, from a trial of two inference steps and of a few layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..calibration.layers import quantize_layer
from ..calibration.moments import InputMoments
from ..calibration.passes import MAX_COLUMNS
from ..calibration.time_estimate import GRADIENTS, now, time_sampling
from ..evaluation import generate_images
from .estimates import PROBES
from .layer_cost import layer_cost, round_weight
from .study import Study


@torch.no_grad()
def estimate_seconds(study: Study, method: str, widths: int, processes: int = 1) -> float:
    """Estimate the seconds of a whole analysis.

    Args:
        study: what is measured; its reference is not needed.
        method: name of the method.
        widths: number of bits that every layer is measured at.
        processes: number of processes that share the layers; sampling and packing are of one.
    """
    by_size = sorted(study.layers.values(), key=lambda layer: layer.get_parameter("weight").numel())
    weights = [layer.get_parameter("weight") for layer in by_size]
    total = sum(weight.numel() for weight in weights)
    middle = len(weights) // 2
    device = weights[0].device

    def seconds_of(work: Callable[[Tensor], Any], weight: Tensor) -> float:
        work(weights[0])  # The first call loads kernels.
        start = now(device)
        work(weight)
        return now(device) - start

    def of_all_layers(work: Callable[[Tensor], Any]) -> float:
        """Return the seconds for all layers, by the line through those of the median layer and of the largest."""
        fewer, more = weights[middle].numel(), weights[-1].numel()
        seconds = seconds_of(work, weights[middle])
        if fewer == more:
            return seconds * len(weights)
        slope = max(0.0, seconds_of(work, weights[-1]) - seconds) / (more - fewer)
        return max(0.0, seconds - slope * fewer) * len(weights) + slope * total

    packing = of_all_layers(layer_cost)
    rounding = of_all_layers(lambda weight: round_weight(weight, 2)) * widths
    if method == "weight":
        return packing + rounding / processes

    settings, model = study.settings, study.model
    sampling = settings.sampling
    captions = study.captions[: sampling.batch_size]

    def sample(steps: int) -> None:
        generate_images(study.pipeline, captions, replace(sampling, steps=steps), progress=False)

    trial = time_sampling(study.pipeline, model, sample)
    images = -(-len(study.captions) // sampling.batch_size) * trial.seconds(sampling.steps)
    call, items = trial.call, len(weights) * widths
    if method == "full":
        work = items * (images + settings.qat_steps * GRADIENTS * call) + rounding
    elif method == "calibrated":
        chosen, columns = by_size[middle], weights[middle][0].numel()
        moments = InputMoments(chosen, MAX_COLUMNS)
        moments.add(torch.randn(64, columns * getattr(chosen, "groups", 1), device=device))
        start = now(device)
        quantize_layer(chosen, moments, 2)
        calibrating = (now(device) - start) * total / weights[middle].numel() * widths
        work = (1 + len(weights) + items) * settings.calls / 2 * call + calibrating
    elif method == "prediction":
        work = items * settings.calls * call + rounding
    elif method == "gradient":
        work = settings.calls * ((1 + PROBES * (GRADIENTS - 1)) * call + PROBES * rounding)
    else:  # "output" repeats every layer's product for each width and for the weight itself.
        work = settings.calls * ((2 + widths) * call + rounding)
    return packing + images + work / processes
