"""Sensitivity without training and sampling: estimates of the effect of rounding a layer, cheapest first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from .header import Item
from .layer_cost import round_weight, temporary_weight
from .study import Record, Study

# Number of random directions of the output that each call is differentiated along. With 8 calls each estimate has a
# relative deviation of 25 %, partly the same for all layers: little against sensitivities that differ a thousandfold.
PROBES = 4

# Number of positions of each sample, on average, whose inputs calibrate a layer: more than in a calibration run, since
# there are only a few calls.
_POSITIONS = 512


def measure_weight(study: Study, items: Iterable[Item]) -> Iterator[Record]:
    """Measure the squared rounding error of the weights, ||w - Q(w)||^2, as `weight_error`."""
    for name, bits in items:
        yield (name, bits), {"weight_error": float(_change(study.layers[name], bits).square().sum())}


@torch.no_grad()
def measure_output(study: Study, items: Iterable[Item]) -> Iterator[Record]:
    """Measure each layer's relative output error on its real inputs, as `output_error`, in one pass over the calls.

    The error is ||(w - Q(w)) x||^2 / ||w x||^2, both summed over the calls; 0 for a layer whose output is 0.
    """
    errors: dict[Item, float] = defaultdict(float)
    powers: dict[str, float] = defaultdict(float)
    items = list(items)
    widths = _by_layer(items)

    def output_hook(name: str) -> Callable[..., None]:
        def hook(layer: nn.Linear | nn.Conv2d, args: tuple[Any, ...], output: Tensor) -> None:
            powers[name] += _power(_apply(layer, layer.weight, args[0]))
            for bits in widths[name]:
                errors[name, bits] += _power(_apply(layer, _change(layer, bits), args[0]))

        return hook

    with ExitStack() as stack:
        for name in widths:
            hook = study.layers[name].register_forward_hook(output_hook(name))
            stack.callback(hook.remove)
        for call in study.reference.calls:
            call.repeat(study.model)
    for item in items:  # The error of a layer that is never called is 0.
        yield item, {"output_error": errors[item] / powers[item[0]] if errors[item] else 0.0}


def measure_gradient(study: Study, items: Iterable[Item]) -> Iterator[Record]:
    """Estimate the change of the prediction to second order, as `gradient_error`, by one backward pass a probe.

    To first order, changing a layer's weight by d changes the prediction by J d, with J its Jacobian, and a squared
    loss by |J d|^2. For a random direction v of the prediction, (v . J d)^2 has that expectation, and v J is the
    weight's gradient of the sum of v times the prediction: one backward pass serves all layers and widths. Per element
    of the prediction, averaged over calls and probes.
    """
    errors: dict[Item, float] = defaultdict(float)
    items = list(items)
    widths = _by_layer(items)
    calls = study.reference.calls
    scale = 1 / (len(calls) * PROBES)

    def gradient_hook(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            gradient = cast(Tensor, weight.grad)
            for bits in widths[name]:
                slope = float((gradient * _change(study.layers[name], bits)).sum())
                errors[name, bits] += scale * slope**2
            weight.grad = None  # The gradient is freed at once, so that memory never holds a second copy of the model.

        return hook

    generator = torch.Generator().manual_seed(study.settings.sampling.seed)
    with ExitStack() as stack, torch.enable_grad():
        for name in widths:
            weight = study.layers[name].weight.requires_grad_(True)
            stack.callback(weight.requires_grad_, False)
            stack.callback(weight.register_post_accumulate_grad_hook(gradient_hook(name)).remove)
        for call in calls:
            prediction = call.repeat(study.model)
            for probe in range(PROBES):
                direction = torch.randn(prediction.shape, generator=generator).to(prediction.device)
                along = (direction * prediction).sum() / prediction.numel() ** 0.5
                along.backward(retain_graph=probe < PROBES - 1)
    for item in items:  # The error of a layer that the prediction does not depend on is 0.
        yield item, {"gradient_error": errors[item]}


@torch.no_grad()
def measure_prediction(study: Study, items: Iterable[Item]) -> Iterator[Record]:
    """Measure the mean squared change of the prediction with the layer rounded, as `prediction_error`."""
    for name, bits in items:
        layer = study.layers[name]
        with temporary_weight(layer, round_weight(layer.weight, bits)):
            errors = [F.mse_loss(call.repeat(study.model), call.output) for call in study.reference.calls]
        yield (name, bits), {"prediction_error": float(torch.stack(errors).mean())}


@torch.no_grad()
def measure_calibrated(study: Study, items: Iterable[Item]) -> Iterator[Record]:
    """Measure the change of the prediction with the layer calibrated, as `calibrated_error`.

    The layer is calibrated for its inputs in every second of the recorded calls, and the prediction is that of the
    others. The square error of each sample counts relative to its error with all layers rounded to 2 bits: at high
    noise errors are small, but decide on the image's content.

    Raises:
        ValueError: there is only one call.
    """
    seen, rest = study.reference.calls[::2], study.reference.calls[1::2]
    if not rest:
        raise ValueError(
            'The method "calibrated" needs two calls: raise calls, and the images or steps that make them.'
        )
    with ExitStack() as stack:
        for layer in study.layers.values():
            stack.enter_context(temporary_weight(layer, round_weight(layer.weight, 2)))
        usual = torch.cat([square_errors(call.repeat(study.model), call.output) for call in rest])
    for name, widths in _by_layer(items).items():
        layer = study.layers[name]
        moments = _input_moments(study, layer, seen)
        for bits in widths:
            rounded = quantize_layer(layer, moments, bits)
            weight = decode_weight(rounded.codes, rounded.scale, bits, tuple(layer.weight.shape), torch.float32)
            with temporary_weight(layer, weight, rounded.bias):
                errors = [(call.repeat(study.model) - call.output).square().flatten(1).mean(dim=1) for call in rest]
            yield (name, bits), {"calibrated_error": float((torch.cat(errors) / usual).mean())}


def _input_moments(study: Study, layer: nn.Linear | nn.Conv2d, calls: Sequence[Call]) -> InputMoments:
    """Return the moments of a layer's inputs in the given calls."""
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
    """Return the numbers of bits to measure by layer name."""
    widths: dict[str, list[int]] = defaultdict(list)
    for name, bits in items:
        widths[name].append(bits)
    return widths


@torch.no_grad()
def _change(layer: nn.Linear | nn.Conv2d, bits: int) -> Tensor:
    """Return Q(w) - w, fp32 of the weight's shape."""
    return round_weight(layer.weight, bits) - layer.weight


def _apply(layer: nn.Linear | nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    """Return the layer's output with `weight` and without bias, without calling its hooks."""
    return layer._conv_forward(x, weight, None) if isinstance(layer, nn.Conv2d) else F.linear(x, weight)


def _power(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
