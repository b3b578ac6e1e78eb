"""Bits per layer from the layers' sizes alone, for models that nobody has analysed."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from ..codec.grid import cost_in_bits

# Mean squared error of a unit Gaussian rounded to 1 to 7 bits at its best scale (paper, section 3).
_GAUSSIAN_ERROR = (0.190174, 0.082178, 0.030696, 0.010405, 0.003313, 0.001012, 0.000300)
_WIDTHS = range(1, len(_GAUSSIAN_ERROR) + 1)


def allocate_data_free(sizes: Mapping[str, int], budget: float, *, balance: bool = True) -> dict[str, int]:
    """Bits per layer from the layers' sizes alone, for a model nobody has analysed.

    Rounding adds noise to a layer's output in proportion to its relative weight error, whatever its size; so the sum
    of these errors is minimised under the budget, one bit at a time where it removes most error for its bytes. Small
    layers, where a bit costs little, come out protected: n falls by half a bit to a bit per doubling of the size, much
    as in the paper's published recipe.

    Args:
        sizes: weights by layer name.
        budget: bits that all layers may take together, counted as log2(levels) a weight.
        balance: whether the grids are balanced.

    Returns:
        Bits, 1 to 7, by layer name.

    Raises:
        ValueError: the budget is below 1-bit layers throughout or above 7-bit ones, or there are no layers.
    """
    if not sizes:
        raise ValueError("there are no layers to allocate bits to")
    total = sum(sizes.values())
    least, most = (cost_in_bits(bits, balance) * total for bits in (_WIDTHS[0], _WIDTHS[-1]))
    if not least <= budget <= most:
        raise ValueError(
            f"no assignment of 1 to 7 bits reaches {budget / total:.3f} bits a weight over {len(sizes)} layers: they "
            f"take {least / total:.3f} to {most / total:.3f}"
        )
    bits = dict.fromkeys(sizes, 1)
    spent = least

    def step(name: str) -> tuple[float, str, float]:
        """(error removed per bit of budget, negated for the heap; layer; bits of budget) of one bit more."""
        now = bits[name]
        cost = (cost_in_bits(now + 1, balance) - cost_in_bits(now, balance)) * sizes[name]
        return (_GAUSSIAN_ERROR[now] - _GAUSSIAN_ERROR[now - 1]) / cost, name, cost

    steps = [step(name) for name in sizes]
    heapq.heapify(steps)
    while steps:
        _, name, cost = heapq.heappop(steps)
        if spent + cost > budget:
            continue  # a smaller layer may still fit
        bits[name] += 1
        spent += cost
        if bits[name] < _WIDTHS[-1]:
            heapq.heappush(steps, step(name))
    return bits
