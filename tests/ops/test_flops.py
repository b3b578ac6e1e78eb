"""Floating-point operations, as torch counts them: those of the float layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.nn.conversion import float_from_packed, pack_weight, packed_from_float
from diffusers_bitsfusion.ops.attention import attention

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "linear": (nn.Linear(10, 6), (2, 3, 10)),
    "conv": (nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2, bias=False), (2, 8, 9, 9)),
}


def count(call, x, differentiate):
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(differentiate):
        y = call(x.requires_grad_(differentiate))
        if differentiate:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_packed_layer_counts_as_the_float_one(kind, compute, differentiate):
    layer, shape = LAYERS[kind]
    packed = pack_weight(packed_from_float(layer, 2, torch.float32), layer.weight, Rounding())
    plain = float_from_packed(packed).requires_grad_(False)
    packed.set_compute(compute, "packed")
    expected = count(plain, torch.randn(shape), differentiate)
    assert expected
    assert count(packed, torch.randn(shape), differentiate) == expected


def test_a_gated_projection_counts_as_its_product():
    layer = nn.Linear(10, 6)
    packed = pack_weight(packed_from_float(layer, 2, torch.float32), layer.weight, Rounding())
    x = torch.randn(5, 10)
    assert count(lambda x: packed(x, geglu=True), x, False) == count(layer, x, False)


def test_attention_counts_as_its_two_products():
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    products = count(lambda q: (q @ key.transpose(2, 3)) @ key, query, False)
    assert count(lambda q: attention(q, key, key), query, False) == products
