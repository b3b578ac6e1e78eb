"""Inputs of layers as rows, and their moments, against what the layers compute and what numpy says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_bitsfusion.calibration.moments import InputMoments, channel_blocks, moment_bytes, sample_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

CONVOLUTIONS = {
    "3x3": {"padding": 1},
    "strided": {"padding": 1, "stride": 2},
    "dilated": {"padding": 2, "dilation": 2},
    "unpadded": {},
    "same": {"padding": "same"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "oblong": {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
    "pointwise": {"kernel_size": 1},
}
ALL = 10**9


def conv(**settings) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(6, 8, **{"kernel_size": 3} | settings)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@torch.no_grad()
def test_rows_times_the_flat_weight_are_the_outputs_of_a_convolution(settings, groups):
    layer, x = conv(groups=groups, **settings), torch.randn(2, 6, 7, 9, generator=rng())
    rows = sample_inputs(layer, x, ALL, rng())
    parts = zip(rows.chunk(groups, dim=1), layer.weight.flatten(1).chunk(groups), strict=True)
    outputs = torch.cat([part @ weight.T for part, weight in parts], dim=1) + layer.bias
    assert torch.allclose(outputs, layer(x).permute(0, 2, 3, 1).reshape(-1, 8), atol=1e-5)


def test_rows_of_a_convolution_are_those_of_unfold():
    layer, x = conv(padding=1, stride=2, dilation=2), torch.randn(2, 6, 7, 9, generator=rng())
    unfolded = F.unfold(x, 3, dilation=2, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    assert torch.equal(sample_inputs(layer, x, ALL, rng()), unfolded)


def test_rows_of_a_linear_layer_are_its_tokens_in_fp32():
    x = torch.randn(2, 5, 4).half()
    assert torch.equal(sample_inputs(nn.Linear(4, 3), x, ALL, rng()), x.reshape(-1, 4).float())


@pytest.mark.parametrize(("layer", "x"), [(conv(), torch.randn(2, 6, 9, 9)), (nn.Linear(6, 2), torch.randn(2, 49, 6))])
def test_a_sample_holds_so_many_different_positions_for_each_image(layer, x):
    everything = {tuple(row.tolist()) for row in sample_inputs(layer, x, ALL, rng())}
    some = [tuple(row.tolist()) for row in sample_inputs(layer, x, 10, rng())]
    assert len(some) == len(set(some)) == 20 and everything.issuperset(some)


def test_blocks_are_equal_parts_of_each_group():
    assert channel_blocks(conv(), 54) == [(0, 6)]
    assert channel_blocks(conv(), 53) == [(0, 3), (3, 6)]
    assert channel_blocks(conv(groups=2), 20) == [(0, 1), (1, 3), (3, 4), (4, 6)]
    assert channel_blocks(nn.Linear(7, 2), 3) == [(0, 2), (2, 4), (4, 7)]
    assert channel_blocks(conv(), 1) == [(i, i + 1) for i in range(6)]  # a channel's nine taps stay together


@pytest.mark.parametrize("max_columns", [54, 20])
def test_moments_are_the_blocks_of_numpys(max_columns):
    layer, x = conv(padding=1), torch.randn(4, 6, 8, 8, generator=rng()) + 2
    moments = InputMoments(layer, max_columns)
    for part in x.split(1):
        moments.add(sample_inputs(layer, part, ALL, rng()))
    rows = sample_inputs(layer, x, ALL, rng()).double().numpy()
    assert moments.count == len(rows)
    assert np.allclose(moments.mean(), rows.mean(axis=0), atol=1e-5)
    for block, (start, stop) in enumerate(moments.blocks):
        part = rows[:, start:stop]
        assert np.allclose(moments.second_moment(block, centred=False), part.T @ part / len(rows), atol=1e-4)
        assert np.allclose(moments.second_moment(block, centred=True), np.cov(part.T, bias=True), atol=1e-4)


@pytest.mark.parametrize("layer", [conv(groups=2), nn.Linear(700, 2)])
@pytest.mark.parametrize("max_columns", [1000, 54, 20])
def test_stated_bytes_are_those_of_the_tensors(max_columns, layer):
    moments = InputMoments(layer, max_columns)
    held = [moments.total, *(product.values for product in moments.products)]
    assert moment_bytes(layer, max_columns) == sum(t.numel() * t.element_size() for t in held)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_noticed(value):
    layer = nn.Linear(4, 2)
    moments = InputMoments(layer, 2)
    moments.add(torch.ones(3, 4))
    assert moments.is_finite
    moments.add(torch.tensor([[1.0, 1.0, 1.0, value]]))
    assert not moments.is_finite
