"""Bits per layer that minimise the total predicted damage under a budget: a multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

# Steps that the budget beyond the cheapest assignment is divided into.
_CELLS = 1 << 16


def knapsack(damage: Mapping[str, Sequence[float]], cost: Mapping[str, Sequence[int]], budget: int) -> dict[str, int]:
    """Bits per layer of the smallest total damage whose total cost is within the budget.

    By dynamic programming over what is spent beyond the cheapest assignment, in 65536 cells: exact where a cell is a
    byte, else each layer's share is rounded up to a cell, so that at most as many cells as layers stay unused. (As an
    integer program HiGHS takes several times as long, and may exceed the budget by its tolerance.) A layer gets more
    bits only where that lessens its damage, so one that never changes the output gets the fewest.

    Args:
        damage: of each layer at 1, 2, ... bits.
        cost: of each layer at 1, 2, ... bits, in bytes.
        budget: bytes that all layers may take together.

    Returns:
        Bits by layer.

    Raises:
        ValueError: no assignment is within the budget.
    """
    options = {name: _worthwhile(damage[name], cost[name]) for name in cost}
    cheapest = {name: cost[name][widths[0] - 1] for name, widths in options.items()}
    spare = budget - sum(cheapest.values())
    if spare < 0:
        raise ValueError(f"no assignment of bits fits into {budget} bytes: the smallest takes {budget - spare}")
    cell = max(1, math.ceil(spare / _CELLS))
    # The cells that each layer takes at each of its options.
    steps = {name: [math.ceil((cost[name][n - 1] - cheapest[name]) / cell) for n in options[name]] for name in cost}

    # least[c]: the smallest damage of the layers so far in at most c cells; chosen: each layer's option there.
    least = np.zeros(spare // cell + 1)
    chosen = {}
    for name, widths in options.items():
        before, least = least, least + damage[name][widths[0] - 1]
        chosen[name] = np.zeros(len(least), np.uint8)
        for option, (bits, step) in enumerate(zip(widths, steps[name], strict=True)):
            found = before[: max(len(before) - step, 0)] + damage[name][bits - 1]
            better = found < least[step:]
            least[step:][better] = found[better]
            chosen[name][step:][better] = option

    bits_of, left = {}, len(least) - 1
    for name in reversed(list(cost)):
        option = int(chosen[name][left])
        bits_of[name] = options[name][option]
        left -= steps[name][option]
    return {name: bits_of[name] for name in cost}


def _worthwhile(damage: Sequence[float], cost: Sequence[int]) -> list[int]:
    """Numbers of bits that do less damage than every cheaper one."""
    best, worthwhile = math.inf, []
    for _, bits in sorted((size, bits) for bits, size in enumerate(cost, start=1)):
        if damage[bits - 1] < best:
            best = damage[bits - 1]
            worthwhile.append(bits)
    return worthwhile
