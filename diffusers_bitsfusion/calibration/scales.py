"""Scales that minimise the error of a layer's output, beside the codes that belong to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..codec.scales import quantize_rows
from .rounding import Factor, project, round_with_compensation

# Multiples of the weights' own best scale to start from, and rounds of codes given scale, scale given codes.
_STARTS = (1.0, 0.8, 0.9, 1.1, 1.2)
_ROUNDS = 2


def quantize_rows_for_inputs(
    weight: Tensor,
    factors: Sequence[Factor],
    bits: int,
    *,
    scale_init: str = "alternating",
    iterations: int = 10,
    balance: bool = True,
) -> tuple[Tensor, Tensor]:
    """Codes and scale of each row, small in the mean square error of the output.

    As in the paper's alternation (section 3.2), codes are found for a scale and the scale for codes, here with
    compensated codes and ||R (w − s·k)||² in place of ||w − s·k||²; each row keeps the best that it met. Plain
    rounding is among the candidates, so that the result is never worse.

    Args:
        weight: fp32 [rows, columns].
        factors: of the inputs' second moment, see `rounding.round_with_compensation`.
        bits, scale_init, iterations, balance: as in `codec.scales.quantize_rows`, which gives the first scale.

    Returns:
        codes int8 [rows, columns], scale fp32 [rows].

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    codes, scale = quantize_rows(weight, bits, scale_init=scale_init, iterations=iterations, balance=balance)
    target = project(weight, factors)
    reached = project(scale.unsqueeze(1) * codes, factors)
    best = codes, scale, (target - reached).square().sum(dim=1)

    def attempt(best: tuple[Tensor, Tensor, Tensor], scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, residual = round_with_compensation(weight, factors, scale, bits, balance=balance)
        return _better(best, (codes, *_refit(target, residual, scale)))

    first = scale
    for multiple in _STARTS:
        best = attempt(best, first * multiple)
    for _ in range(_ROUNDS):
        best = attempt(best, best[1])
    return best[0], best[1]


def _refit(target: Tensor, residual: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The best scale [rows] for codes already found, and its error [rows]."""
    reached = target - residual  # R (s·k)
    dot, norm = torch.linalg.vecdot(target, reached), torch.linalg.vecdot(reached, reached)
    ratio = torch.where(dot > 0, dot / norm, 1.0)
    return scale * ratio, (target - ratio.unsqueeze(1) * reached).square().sum(dim=1)


def _better(
    best: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of two (codes, scale, error), each row's with the smaller error."""
    wins = other[2] < best[2]
    codes = torch.where(wins.unsqueeze(1), other[0], best[0])
    return codes, torch.where(wins, other[1], best[1]), torch.where(wins, other[2], best[2])
