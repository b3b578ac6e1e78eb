"""Bits per layer that minimise the total predicted sensitivity under a budget: a multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

# Number of cells that the budget beyond the cheapest assignment is divided into; at most a cell a layer stays unused,
# 0.4 % of it for the 256 layers of Stable Diffusion 1.5.
_CELLS = 1 << 16


def knapsack(
    sensitivity: Mapping[str, Sequence[float]], cost: Mapping[str, Sequence[int]], budget: int
) -> dict[str, int]:
    """Return the bits per layer of the smallest total sensitivity whose total cost is within the budget.

    The method is dynamic programming over what is spent beyond the cheapest assignment, in 65536 cells. It is exact
    where a cell is a byte; else each layer's share is rounded up to a cell, so that at most as many cells as layers
    stay unused. (The solver HiGHS needs several times as long for the integer program, and may exceed the budget by
    its tolerance.) A layer gets more bits only where that lowers its sensitivity, so a layer that never changes the
    output gets the fewest.

    Args:
        sensitivity: sensitivity of each layer at 1, 2, ... bits.
        cost: bytes of each layer at 1, 2, ... bits.
        budget: bytes of all layers together.

    Returns:
        Bits by layer name.

    Raises:
        ValueError: no assignment is within the budget.
    """
    options = {name: _useful_bits(sensitivity[name], cost[name]) for name in cost}
    cheapest = {name: cost[name][widths[0] - 1] for name, widths in options.items()}
    spare = budget - sum(cheapest.values())
    if spare < 0:
        raise ValueError(f"no assignment of bits fits into {budget} bytes: the smallest takes {budget - spare}")
    cell = max(1, math.ceil(spare / _CELLS))
    # Cells of each layer at each of its options.
    steps = {name: [math.ceil((cost[name][n - 1] - cheapest[name]) / cell) for n in options[name]] for name in cost}

    # minimum[c] is the smallest sum over the layers so far in at most c cells, chosen each layer's option there.
    minimum = np.zeros(spare // cell + 1)
    chosen = {}
    for name, widths in options.items():
        before, minimum = minimum, minimum + sensitivity[name][widths[0] - 1]
        chosen[name] = np.zeros(len(minimum), np.uint8)
        for option, (bits, step) in enumerate(zip(widths, steps[name], strict=True)):
            candidate = before[: max(len(before) - step, 0)] + sensitivity[name][bits - 1]
            better = candidate < minimum[step:]
            minimum[step:][better] = candidate[better]
            chosen[name][step:][better] = option

    bits_of, left = {}, len(minimum) - 1
    for name in reversed(list(cost)):
        option = int(chosen[name][left])
        bits_of[name] = options[name][option]
        left -= steps[name][option]
    return {name: bits_of[name] for name in cost}


def _useful_bits(sensitivity: Sequence[float], cost: Sequence[int]) -> list[int]:
    """Return the numbers of bits whose sensitivity is lower than that of every cheaper one."""
    best, useful = math.inf, []
    for _, bits in sorted((size, bits) for bits, size in enumerate(cost, start=1)):
        if sensitivity[bits - 1] < best:
            best = sensitivity[bits - 1]
            useful.append(bits)
    return useful
