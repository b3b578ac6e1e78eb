"""Codes and scales of little error at a given number of bits a weight in the entropy-coded file.

A grid with more levels and a wider step takes no more bytes than one of few levels and a narrow step, and keeps the
large weights that few levels cut off. So the grid is wide, the codes mind what their symbols cost
(`codec.rate_distortion`), and the step is the one at which the codes take the bytes that they may.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..codec.entropy import compress
from ..codec.grid import half_range
from ..codec.radix import pack_bytes
from ..codec.rate_distortion import PRICE, cheap_codes, symbol_bits
from ..codec.scales import check_finite
from .compensated_rounding import Factor, project, round_with_compensation

# Entropy of a unit Gaussian whose step is 1, extrapolated from fine grids: the first guess of a step.
_GAUSSIAN_BITS = 0.5 * math.log2(2 * math.pi * math.e)

# Number of weights that a step is tried on, and how often.
_SAMPLE = 1 << 17
_TRIES = 4
# Least root mean square of a row relative to its largest weight, so that a row of zeros has a step.
_LEAST = 1e-6
# Share of the bytes that may be left over.
_TOLERANCE = 0.004


def quantize_rows_at_rate(weight: Tensor, factors: Sequence[Factor], bits: int, rate: float) -> tuple[Tensor, Tensor]:
    """Quantize rows to codes that take at most `rate` bits a weight as a frame of the file.

    The steps of the rows are in proportion to the root mean square of their weights. Given a step, codes are chosen by
    error and price; given the codes, each row's scale is the one of least squared error, so that the output is not
    shrunk by codes that were drawn towards zero.

    Args:
        weight: fp32 [rows, columns].
        factors: factors of the inputs' second moment, see `compensated_rounding.round_with_compensation`; empty where
            nothing is known of the inputs.
        bits: number of bits of the grid, 1 to 8.
        rate: bits a weight, positive.

    Returns:
        codes int8 [rows, columns], scale fp32 [rows], positive. A row of zeros gets codes 0 and scale 1. Where not
        even the widest step that was tried suffices, the codes take a few more bytes.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    largest = weight.abs().amax(dim=1)
    check_finite(largest)
    largest = torch.where(largest > 0, largest, 1.0)
    spread = largest * (weight / largest.unsqueeze(1)).square().mean(dim=1).sqrt().clamp_min(_LEAST)
    rows = torch.arange(0, len(weight), max(1, weight.numel() // _SAMPLE), device=weight.device)
    sample, exponent, symbols = weight[rows], _GAUSSIAN_BITS - rate, None
    for _ in range(_TRIES):
        codes, _, symbols = _round(sample, factors, bits, spread[rows] * 2**exponent, symbols)
        excess = _rate(codes, bits) - rate
        if -_TOLERANCE * rate < excess <= 0:
            break
        exponent += excess + _TOLERANCE / 2 * rate
    for _ in range(_TRIES):
        codes, scale, symbols = _round(weight, factors, bits, spread * 2**exponent, symbols)
        if (excess := _rate(codes, bits) - rate) <= 0:
            break
        exponent += excess + _TOLERANCE / 2 * rate
    return codes, scale


def _rate(codes: Tensor, bits: int) -> float:
    """Return the bits a weight that codes take as a frame of the file."""
    return 8 * compress(pack_bytes(codes, bits)).numel() / codes.numel()


def _round(
    weight: Tensor, factors: Sequence[Factor], bits: int, step: Tensor, symbols: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes int8, the scales of least squared error fp32 [rows], and the bits of the symbols in these codes.

    Args:
        weight: fp32 [rows, columns].
        factors: as in `quantize_rows_at_rate`.
        bits: number of bits of the grid.
        step: fp32 [rows].
        symbols: bits of the symbols that the codes are chosen by; None for those of plain rounding.
    """
    half = half_range(bits)
    if symbols is None:
        nearest = (weight / step.unsqueeze(1)).round_().clamp_(-half, half).to(torch.int8)
        symbols = symbol_bits(nearest, bits)
    if factors:
        codes, residual = round_with_compensation(weight, factors, step, bits, symbols=symbols)
        target = project(weight, factors)
        reached = target - residual
    else:
        codes = cheap_codes(weight / step.unsqueeze(1), PRICE * symbols).to(torch.int8)
        target, reached = weight, codes * step.unsqueeze(1)
    dot, norm = torch.linalg.vecdot(target, reached), torch.linalg.vecdot(reached, reached)
    gain = torch.where(dot > 0, dot / norm, 1.0)
    empty = (codes == 0).all(dim=1)
    return codes, torch.where(empty, 1.0, step * gain), symbol_bits(codes, bits)
