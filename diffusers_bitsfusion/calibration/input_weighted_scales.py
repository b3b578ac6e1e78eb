"""Codes and scales that keep the error of a layer's output and the bytes of its codes small."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..codec.grid import code_range
from ..codec.rounding import Rounding
from ..codec.scales import quantize_rows
from .compensated_rounding import Factor, project, round_with_compensation

# Multiples of the scale of least weight error that the search starts from.
_STARTS = (1.0, 0.9, 1.1, 1.25, 1.45)
# Number of rounds of the alternation: codes for the scale, then the scale for the codes.
_ROUNDS = 2

# Weight of a bit of entropy, where a factor of 4 in the squared error weighs 1. At a weight of 1 the two would be
# exchanged as they are on fine grids, where no scale is better than another; below it, fine grids keep the scale of
# least error.
RATE = 0.75


def quantize_rows_for_inputs(
    weight: Tensor,
    factors: Sequence[Factor],
    bits: int,
    rounding: Rounding = Rounding(),
) -> tuple[Tensor, Tensor]:
    """Quantize rows with little mean square error of the output and little entropy of the codes.

    As in the paper's alternation (section 3.2), codes are computed for a scale and the scale for codes, here with
    compensated codes and ||R (w − s·k)||² in place of ||w − s·k||². The file is entropy coded, so a scale above the
    one of least error spends fewer bytes: each row keeps the candidate of least ½ log₂ error + `RATE` × entropy, in
    bits a weight. Plain rounding is among the candidates.

    Args:
        weight: fp32 [rows, columns].
        factors: factors of the inputs' second moment, see `compensated_rounding.round_with_compensation`.
        bits: number of bits, 1 to 8.
        rounding: settings of `codec.scales.quantize_rows`, which gives the first scale.

    Returns:
        codes int8 [rows, columns], scale fp32 [rows].

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    codes, scale = quantize_rows(weight, bits, rounding)
    target = project(weight, factors)
    reached = project(scale.unsqueeze(1) * codes, factors)
    levels = code_range(bits, rounding.balance)
    best = codes, scale, _cost((target - reached).square().sum(dim=1), codes, levels)

    def attempt(best: tuple[Tensor, Tensor, Tensor], scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, residual = round_with_compensation(weight, factors, scale, bits, balance=rounding.balance)
        scale, error = _refit(target, residual, scale)
        return _better(best, (codes, scale, _cost(error, codes, levels)))

    first = scale
    for multiple in _STARTS:
        best = attempt(best, first * multiple)
    for _ in range(_ROUNDS):
        best = attempt(best, best[1])
    return best[0], best[1]


def _refit(target: Tensor, residual: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best scale fp32 [rows] for given codes, and its squared error fp32 [rows]."""
    reached = target - residual  # It is R (s·k).
    dot, norm = torch.linalg.vecdot(target, reached), torch.linalg.vecdot(reached, reached)
    ratio = torch.where(dot > 0, dot / norm, 1.0)
    return scale * ratio, (target - ratio.unsqueeze(1) * reached).square().sum(dim=1)


def _cost(error: Tensor, codes: Tensor, levels: tuple[int, int]) -> Tensor:
    """Return the cost of each row, fp32 [rows] in bits a weight, from its squared error [rows] and its codes' entropy.

    Args:
        error: fp32 [rows].
        codes: int8 [rows, columns].
        levels: (lowest, highest) code of the grid.
    """
    low, high = levels
    rows, count = len(codes), high - low + 1
    offsets = count * torch.arange(rows, device=codes.device).unsqueeze(1) - low
    shares = torch.bincount((codes + offsets).flatten(), minlength=rows * count).view(rows, count) / codes.shape[1]
    entropy: Tensor = torch.special.entr(shares).sum(dim=1) / math.log(2)
    return error.log2() / 2 + RATE * entropy


def _better(
    best: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes, scale, cost) with each row from the candidate of the smaller cost."""
    wins = other[2] < best[2]
    codes = torch.where(wins.unsqueeze(1), other[0], best[0])
    return codes, torch.where(wins, other[1], best[1]), torch.where(wins, other[2], best[2])
