"""Layers in integers at the edges of what they may be given: nothing, one column, rows of equal values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusers_bitsfusion.codec.quantize_dense import quantize_to_dense
from diffusers_bitsfusion.nn.conv import BitsFusionConv2d
from diffusers_bitsfusion.nn.linear import BitsFusionLinear
from diffusers_bitsfusion.ops import activations
from diffusers_bitsfusion.ops.activations import (
    quantize_image,
    quantize_image_reference,
    quantize_tokens,
    quantize_tokens_reference,
)
from diffusers_bitsfusion.ops.dispatch import why_no_int8

in_integers = pytest.mark.skipif(why_no_int8(torch.device("cpu")) is not None, reason="integers need oneDNN on x86")


@pytest.fixture(params=[True, False], ids=["compiled", "plain"])
def compiled(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(activations, "native_library", lambda: None)
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)  # Products are torch's then.


def packed(layer, kind):
    made = kind.from_float(layer, 2, torch.float32)
    made.set_codes(*quantize_to_dense(layer.weight.detach().flatten(1), 2))
    made.requires_grad_(False)
    made.set_compute("int8", "packed")
    return made


@in_integers
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 3, 8)])
def test_linear_layers_of_empty_batches_give_empty_outputs(compiled, shape):
    assert packed(nn.Linear(8, 5), BitsFusionLinear)(torch.empty(shape)).shape == (*shape[:-1], 5)


@in_integers
def test_convolutions_of_empty_batches_give_empty_outputs(compiled):
    assert packed(nn.Conv2d(8, 5, 3), BitsFusionConv2d)(torch.empty(0, 8, 6, 7)).shape == (0, 5, 4, 5)


@in_integers
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("tokens", [1, 5])
def test_few_columns_are_multiplied_rightly(compiled, tokens, columns):
    torch.manual_seed(0)
    layer = packed(nn.Linear(columns, 6), BitsFusionLinear)
    x = torch.randn(tokens, columns)
    codes, scale = quantize_tokens_reference(x)
    expected = (codes * scale[:, None]) @ layer.dense_weight(torch.float32).T + layer.bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, 1e-30, -1e-38, 1e-45, 1e30, 3e38])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 40), (5, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_equal_values_are_rounded_as_by_the_reference(value, shape, dtype):
    x = torch.full(shape, value, dtype=dtype)
    for found, expected in zip(quantize_tokens(x), quantize_tokens_reference(x), strict=True):
        assert torch.equal(found, expected)
    image = x[None, None]
    for found, expected in zip(quantize_image(image), quantize_image_reference(image), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("columns", [1, 7])
def test_no_tokens_give_no_codes(columns):
    for quantize in (quantize_tokens, quantize_tokens_reference):
        codes, scale = quantize(torch.empty(0, columns))
        assert codes.shape == (0, columns) and scale.shape == (0,)
