"""Codes chosen by their error and by what their symbols cost in the file, which is entropy coded.

The rule is that of entropy-constrained scalar quantization (Chou, Lookabaugh and Gray 1989; rate–distortion optimised
quantization in video coding): of a few levels the one of least error + price × bits. The BitsFusion paper does not
have it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .grid import half_range, levels

# Squared error, in squared steps, that a bit is worth on a fine grid: with a step s the error is s²/12 and the entropy
# falls by a bit where s doubles, so that the error changes by 2 ln 2 · s²/12 a bit.
_FINE_GRID = math.log(2) / 6

# Price of a bit, half of what it is worth on a fine grid: the whole draws so many codes to zero that, on the shapes
# pipeline, predictions follow the prompt less at the same entropy.
PRICE = 0.5 * _FINE_GRID


def symbol_bits(codes: Tensor, bits: int) -> Tensor:
    """Return what each level's symbol costs, by its share of the codes.

    Args:
        codes: int8 of any shape.
        bits: number of bits of the grid, 1 to 8.

    Returns:
        fp32 [levels], −log₂ of the shares. Half a code is added to every level, so that none is without a price.
    """
    counts = torch.bincount(codes.flatten().to(torch.int32) + half_range(bits), minlength=levels(bits)) + 0.5
    return -(counts / counts.sum()).log2().float()


def cheap_codes(values: Tensor, prices: Tensor) -> Tensor:
    """Return the codes of least squared error + price of the symbol.

    The candidates are the nearest level, the next one towards zero, and zero.

    Args:
        values: floating, in steps of the grid.
        prices: fp32 [levels], price of each level in squared steps.

    Returns:
        Codes in the dtype and shape of `values`.
    """
    half = len(prices) // 2
    nearest = values.round().clamp_(-half, half)
    lower = nearest - nearest.sign()
    cost = (values - nearest).square_().add_(prices[(nearest + half).int()])
    cost_lower = (values - lower).square_().add_(prices[(lower + half).int()])
    codes = torch.where(cost_lower < cost, lower, nearest)
    cost_zero = values.square().add_(prices[half])
    return torch.where(cost_zero < torch.minimum(cost, cost_lower), 0.0, codes)
