"""One calibrated layer: its output on the inputs it was calibrated for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusers_bitsfusion.calibration.layers import quantize_layer
from diffusers_bitsfusion.calibration.moments import InputMoments, sample_inputs
from diffusers_bitsfusion.codec.scales import quantize_rows
from diffusers_bitsfusion.nn.conversion import packed_from_float

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "linear": lambda: (nn.Linear(24, 12), (40, 24)),
    "no bias": lambda: (nn.Linear(24, 12, bias=False), (40, 24)),
    "conv": lambda: (nn.Conv2d(6, 8, 3, padding=1), (4, 6, 8, 8)),
    "groups": lambda: (nn.Conv2d(6, 8, 3, padding=1, groups=2), (4, 6, 8, 8)),
}


@pytest.fixture(params=LAYERS)
def layer_and_inputs(request):
    torch.manual_seed(0)
    layer, shape = LAYERS[request.param]()
    mixed = torch.randn(shape[1], shape[1]).cumsum(dim=0)
    return layer, torch.einsum("ij,bj...->bi...", mixed, torch.randn(shape) + 1)


def moments_of(layer, x, max_columns=1000) -> InputMoments:
    moments = InputMoments(layer, max_columns)
    moments.add(sample_inputs(layer, x, 10**9, torch.Generator()))
    return moments


def packed(layer, codes, scale, bias):
    packed = packed_from_float(layer, 2, torch.float32)
    packed.set_codes(codes, scale)
    packed.bias = None if bias is None else nn.Parameter(bias)
    return packed


@torch.no_grad()
def test_the_output_changes_far_less_than_by_plain_rounding(layer_and_inputs):
    layer, x = layer_and_inputs
    calibrated = quantize_layer(layer, moments_of(layer, x), 2)
    outputs = packed(layer, calibrated.codes, calibrated.scale, calibrated.bias)(x)
    plain_codes, plain_scale = quantize_rows(layer.weight.flatten(1), 2)
    plain = (plain_scale.unsqueeze(1) * plain_codes).view_as(layer.weight)
    rounded = torch.func.functional_call(layer, {"weight": plain}, x)
    assert (outputs - layer(x)).square().mean() < 0.5 * (rounded - layer(x)).square().mean()


@torch.no_grad()
def test_the_mean_of_the_output_stays_where_there_is_a_bias(layer_and_inputs):
    layer, x = layer_and_inputs
    calibrated = quantize_layer(layer, moments_of(layer, x), 1)
    if layer.bias is None:
        assert calibrated.bias is None
        return
    shift = packed_output_mean(layer, calibrated, x) - channel_mean(layer(x))
    assert shift.abs().max() < 1e-4 * layer(x).abs().max()


def packed_output_mean(layer, calibrated, x):
    packed = packed_from_float(layer, 1, torch.float32)
    packed.set_codes(calibrated.codes, calibrated.scale)
    packed.bias = nn.Parameter(calibrated.bias)
    return channel_mean(packed(x))


def channel_mean(y: torch.Tensor) -> torch.Tensor:
    return y.transpose(0, 1).flatten(1).mean(dim=1)


@torch.no_grad()
def test_a_group_is_rounded_as_a_convolution_of_its_own():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 8, 3, groups=2), torch.randn(4, 6, 8, 8)
    whole = quantize_layer(layer, moments_of(layer, x), 2)
    for group, part in enumerate(x.chunk(2, dim=1)):
        alone = nn.Conv2d(3, 4, 3)
        rows = slice(4 * group, 4 * group + 4)
        alone.weight.data, alone.bias.data = layer.weight[rows].clone(), layer.bias[rows].clone()
        expected = quantize_layer(alone, moments_of(alone, part), 2)
        assert torch.equal(whole.codes[rows], expected.codes)
        assert torch.allclose(whole.scale[rows], expected.scale) and torch.allclose(whole.bias[rows], expected.bias)


def test_a_layer_that_was_never_called_is_rounded_to_the_nearest_level():
    torch.manual_seed(0)
    layer = nn.Linear(24, 12)
    calibrated = quantize_layer(layer, InputMoments(layer, 10), 2)
    found = packed(layer, calibrated.codes, calibrated.scale, calibrated.bias).weight
    codes, scale = quantize_rows(layer.weight.detach(), 2)
    plain = scale.unsqueeze(1) * codes
    assert ((found - layer.weight).norm(dim=1) <= (plain - layer.weight).norm(dim=1) * 1.0001).all()
    assert torch.equal(calibrated.bias, layer.bias)
