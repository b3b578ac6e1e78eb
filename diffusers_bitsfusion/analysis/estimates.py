"""Sensitivity without training and drawing: estimates of the damage that rounding a layer does, cheapest first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.calls import Call, square_errors
from ..calibration.layers import quantize_layer
from ..calibration.moments import InputMoments, sample_inputs
from ..calibration.passes import MAX_COLUMNS
from ..ops.decode import decode_weight
from .layer_cost import holding, round_weight
from .results import Item
from .study import Record, Study

# Random directions of the output that each call is differentiated along. 8 calls leave each estimate with a relative
# deviation of 25 %, the same for all layers in part: little against sensitivities that differ a thousandfold.
_PROBES = 4

# Positions of each sample whose inputs calibrate a layer, on average: here a few calls stand for all of a calibration.
_POSITIONS = 512


def measure_weight(study: Study, items: Iterable[Item]) -> Iterator[Record]:
    """From the weights alone: mean squared rounding error times size, ||w - Q(w)||^2, as `weight_error`."""
    for name, bits in items:
        yield (name, bits), {"weight_error": float(_change(study.layers[name], bits).square().sum())}


@torch.no_grad()
def measure_output(study: Study, items: Iterable[Item]) -> Iterator[Record]:
    """One pass over recorded calls: each layer's own relative output error on its real inputs, as `output_error`.

    ||(w - Q(w)) x||^2 / ||w x||^2, both summed over the calls; 0 for a layer whose weights give nothing.
    """
    errors: dict[Item, float] = defaultdict(float)
    powers: dict[str, float] = defaultdict(float)
    items = list(items)
    widths = _by_layer(items)

    def watch(name: str):
        def hook(layer: nn.Linear | nn.Conv2d, args: tuple[Any, ...], output: Tensor) -> None:
            powers[name] += _power(_apply(layer, layer.weight, args[0]))
            for bits in widths[name]:
                errors[name, bits] += _power(_apply(layer, _change(layer, bits), args[0]))

        return hook

    with ExitStack() as stack:
        for name in widths:
            hook = study.layers[name].register_forward_hook(watch(name))
            stack.callback(hook.remove)
        for call in study.reference.calls:
            call.repeat(study.model)
    for item in items:  # of a layer that is never called, 0
        yield item, {"output_error": errors[item] / powers[item[0]] if errors[item] else 0.0}


def measure_gradient(study: Study, items: Iterable[Item]) -> Iterator[Record]:
    """One backward pass a probe: the second-order estimate of the change of the prediction, as `gradient_error`.

    To first order, changing a layer's weight by d changes the prediction by J d, with J its Jacobian, and a squared
    loss by |J d|^2. For a random direction v of the prediction, (v . J d)^2 has that expectation, and v J is the
    weight's gradient of the sum of v times the prediction: one backward pass serves all layers and widths. Per element
    of the prediction, averaged over calls and probes.
    """
    errors: dict[Item, float] = defaultdict(float)
    items = list(items)
    widths = _by_layer(items)
    calls = study.reference.calls
    scale = 1 / (len(calls) * _PROBES)

    def watch(name: str):
        def hook(weight: Tensor) -> None:
            gradient = cast(Tensor, weight.grad)
            for bits in widths[name]:
                slope = float((gradient * _change(study.layers[name], bits)).sum())
                errors[name, bits] += scale * slope**2
            weight.grad = None  # as soon as it is used, so that no second copy of the model is ever held

        return hook

    generator = torch.Generator().manual_seed(study.settings.sampling.seed)
    with ExitStack() as stack, torch.enable_grad():
        for name in widths:
            weight = study.layers[name].weight.requires_grad_(True)
            stack.callback(weight.requires_grad_, False)
            stack.callback(weight.register_post_accumulate_grad_hook(watch(name)).remove)
        for call in calls:
            prediction = call.repeat(study.model)
            for probe in range(_PROBES):
                direction = torch.randn(prediction.shape, generator=generator).to(prediction.device)
                along = (direction * prediction).sum() / prediction.numel() ** 0.5
                along.backward(retain_graph=probe < _PROBES - 1)
    for item in items:  # of a layer that the prediction does not depend on, 0
        yield item, {"gradient_error": errors[item]}


@torch.no_grad()
def measure_prediction(study: Study, items: Iterable[Item]) -> Iterator[Record]:
    """The mean squared change of the prediction on recorded calls, with the layer rounded, as `prediction_error`."""
    for name, bits in items:
        layer = study.layers[name]
        with holding(layer, round_weight(layer.weight, bits)):
            errors = [F.mse_loss(call.repeat(study.model), call.output) for call in study.reference.calls]
        yield (name, bits), {"prediction_error": float(torch.stack(errors).mean())}


@torch.no_grad()
def measure_calibrated(study: Study, items: Iterable[Item]) -> Iterator[Record]:
    """The change of the prediction with the layer calibrated, as `calibrated_error`.

    The layer is calibrated for its inputs in every second of the recorded calls, and the prediction is that of the
    others. The square error of each sample counts relative to the one it has with all layers rounded to 2 bits: steps
    with much noise make small errors, which decide what is drawn.

    Raises:
        ValueError: there is only one call.
    """
    seen, rest = study.reference.calls[::2], study.reference.calls[1::2]
    if not rest:
        raise ValueError(
            'The method "calibrated" needs two calls: raise calls, and the pictures or steps that make them.'
        )
    with ExitStack() as stack:
        for layer in study.layers.values():
            stack.enter_context(holding(layer, round_weight(layer.weight, 2)))
        usual = torch.cat([square_errors(call.repeat(study.model), call.output) for call in rest])
    for name, widths in _by_layer(items).items():
        layer = study.layers[name]
        moments = _input_moments(study, layer, seen)
        for bits in widths:
            found = quantize_layer(layer, moments, bits)
            weight = decode_weight(found.codes, found.scale, bits, tuple(layer.weight.shape), torch.float32)
            with holding(layer, weight, found.bias):
                errors = [(call.repeat(study.model) - call.output).square().flatten(1).mean(dim=1) for call in rest]
            yield (name, bits), {"calibrated_error": float((torch.cat(errors) / usual).mean())}


def _input_moments(study: Study, layer: nn.Linear | nn.Conv2d, calls: Sequence[Call]) -> InputMoments:
    moments = InputMoments(layer, MAX_COLUMNS)
    generator = torch.Generator().manual_seed(study.settings.sampling.seed)
    hook = layer.register_forward_pre_hook(
        lambda layer, args: moments.add(sample_inputs(layer, args[0], _POSITIONS, generator))
    )
    try:
        for call in calls:
            call.repeat(study.model)
    finally:
        hook.remove()
    return moments


def _by_layer(items: Iterable[Item]) -> dict[str, list[int]]:
    widths: dict[str, list[int]] = defaultdict(list)
    for name, bits in items:
        widths[name].append(bits)
    return widths


@torch.no_grad()
def _change(layer: nn.Linear | nn.Conv2d, bits: int) -> Tensor:
    """Q(w) - w, fp32 of the weight's shape."""
    return round_weight(layer.weight, bits) - layer.weight


def _apply(layer: nn.Linear | nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    """What the layer would give with `weight` and no bias, without its hooks."""
    return layer._conv_forward(x, weight, None) if isinstance(layer, nn.Conv2d) else F.linear(x, weight)


def _power(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
