"""How long an analysis will take, from a trial of two inference steps and of one layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

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
    layers = study.layers
    by_size = sorted(layers.values(), key=lambda layer: layer.weight.numel())
    chosen = by_size[len(by_size) // 2]
    layer_cost(by_size[0].weight)  # The first call loads kernels.
    device = chosen.weight.device
    share = sum(layer.weight.numel() for layer in layers.values()) / chosen.weight.numel()

    def of_all_layers(work: Callable[[], Any]) -> float:
        """Return the seconds of a piece of work for all layers, from the median one's."""
        start = now(device)
        work()
        return (now(device) - start) * share

    packing = of_all_layers(lambda: layer_cost(chosen.weight))
    rounding = of_all_layers(lambda: round_weight(chosen.weight, 2)) * widths
    if method == "weight":
        return packing + rounding / processes

    settings, model = study.settings, study.model
    sampling = settings.sampling
    captions = study.captions[: sampling.batch_size]

    def sample(steps: int) -> None:
        generate_images(study.pipeline, captions, replace(sampling, steps=steps), progress=False)

    trial = time_sampling(study.pipeline, model, sample)
    images = -(-len(study.captions) // sampling.batch_size) * trial.seconds(sampling.steps)
    call, items = trial.call, len(layers) * widths
    if method == "full":
        work = items * (images + settings.qat_steps * GRADIENTS * call) + rounding
    elif method == "calibrated":
        moments = InputMoments(chosen, MAX_COLUMNS)
        moments.add(torch.randn(64, chosen.weight[0].numel() * getattr(chosen, "groups", 1), device=device))
        calibrating = of_all_layers(lambda: quantize_layer(chosen, moments, 2)) * widths
        work = (1 + len(layers) + items) * settings.calls / 2 * call + calibrating
    elif method == "prediction":
        work = items * settings.calls * call + rounding
    elif method == "gradient":
        work = settings.calls * ((1 + PROBES * (GRADIENTS - 1)) * call + PROBES * rounding)
    else:  # "output": every layer's product once more for each width and for the weight itself
        work = settings.calls * ((2 + widths) * call + rounding)
    return packing + images + work / processes
