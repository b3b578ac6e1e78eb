"""Bits per layer from the layers' sizes alone, for models that nobody has analysed."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from ..codec.grid import cost_in_bits

# Mean squared errors of a unit Gaussian rounded to 1, 2, ... 7 bits on the paper's balanced grid (section 3.1), each
# at the scale of least error; computed numerically.
GAUSSIAN_ERROR = (0.190174, 0.082178, 0.030696, 0.010405, 0.003313, 0.001012, 0.000300)
_WIDTHS = range(1, len(GAUSSIAN_ERROR) + 1)


def allocate_data_free(sizes: Mapping[str, int], budget: float, *, balance: bool = True) -> dict[str, int]:
    """Return bits per layer from the layers' sizes alone, for a model that nobody has analysed.

    Rounding adds noise to a layer's output in proportion to its relative weight error, whatever its size. The sum of
    these errors is therefore minimised under the budget, one bit at a time where a bit removes the most error for its
    bytes. Small layers, where a bit costs little, get more bits: they fall by half a bit to a bit per doubling of the
    size, much as in the paper's published recipe.

    Args:
        sizes: number of weights by layer name.
        budget: bits of all layers together, counted as log2(levels) a weight.
        balance: whether the grids are balanced.

    Returns:
        Bits, 1 to 7, by layer name.

    Raises:
        ValueError: the budget is below 1-bit layers throughout or above 7-bit ones, or there are no layers.
    """
    if not sizes:
        raise ValueError("there are no layers to allocate bits to")
    total = sum(sizes.values())
    min_cost, max_cost = (cost_in_bits(bits, balance) * total for bits in (_WIDTHS[0], _WIDTHS[-1]))
    if not min_cost <= budget <= max_cost:
        raise ValueError(
            f"no assignment of 1 to 7 bits reaches {budget / total:.3f} bits a weight over {len(sizes)} layers: they "
            f"take {min_cost / total:.3f} to {max_cost / total:.3f}"
        )
    bits = dict.fromkeys(sizes, 1)
    spent = min_cost

    def step(name: str) -> tuple[float, str, float]:
        """Return (error removed per bit of budget, negated for the heap; layer; bits of budget) of one bit more."""
        now = bits[name]
        cost = (cost_in_bits(now + 1, balance) - cost_in_bits(now, balance)) * sizes[name]
        return (GAUSSIAN_ERROR[now] - GAUSSIAN_ERROR[now - 1]) / cost, name, cost

    steps = [step(name) for name in sizes]
    heapq.heapify(steps)
    while steps:
        _, name, cost = heapq.heappop(steps)
        if spent + cost > budget:
            continue  # A smaller layer may still fit.
        bits[name] += 1
        spent += cost
        if bits[name] < _WIDTHS[-1]:
            heapq.heappush(steps, step(name))
    return bits
