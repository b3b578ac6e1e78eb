"""Rounding of a single layer: its weight, its bytes and its error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..codec.entropy import compress
from ..codec.quantize_dense import quantize_to_dense
from ..codec.radix import bytes_from_dense
from ..ops.decode import decode_weight
from .results import LayerCost

# Numbers of bits that a recipe can give to a layer.
WIDTHS = range(1, 8)
# Bytes of an fp32 scale in the file.
_BYTES_PER_SCALE = 4


@torch.no_grad()
def round_weight(weight: Tensor, bits: int) -> Tensor:
    """Round a weight [out, ...] to its balanced grid at the best scales, and return it in fp32 of the same shape."""
    dense, scale = quantize_to_dense(weight.flatten(1), bits)
    return decode_weight(dense, scale, bits, tuple(weight.shape), torch.float32)


@torch.no_grad()
def layer_cost(weight: Tensor) -> LayerCost:
    """Return the bytes in the file and the squared rounding error of a weight [out, ...] at every number of bits."""
    rows = weight.flatten(1)
    sizes, errors = [], []
    for bits in WIDTHS:
        dense, scale = quantize_to_dense(rows, bits)
        rounded = decode_weight(dense, scale, bits, tuple(rows.shape), torch.float32)
        codes = compress(bytes_from_dense(dense.cpu(), bits, rows.shape[1]))
        sizes.append(codes.numel() + _BYTES_PER_SCALE * len(rows))
        errors.append(float((rounded - rows).square().sum(dtype=torch.float64)))
    return LayerCost(tuple(weight.shape), tuple(sizes), tuple(errors))


@contextmanager
def temporary_weight(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None = None) -> Iterator[None]:
    """Replace a layer's weight, and its bias where one is given, within the block.

    Args:
        layer: layer to change.
        weight: floating, of the weight's shape.
        bias: floating [out]; the layer's own when left out.
    """
    given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    own = {name: layer.get_parameter(name).data for name in given}
    for name, value in given.items():
        layer.get_parameter(name).data = value.to(own[name].dtype)
    try:
        yield
    finally:
        for name, value in own.items():
            layer.get_parameter(name).data = value
