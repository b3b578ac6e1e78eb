"""Bits a weight of each layer in the entropy-coded file, for a size of the file."""

from __future__ import annotations

from collections.abc import Mapping

# Entropy of a unit Gaussian rounded to 1, 2, ... 7 bits on the paper's balanced grid (section 3.1) at the scale of
# least error, and 8 bits at least error; computed numerically.
GAUSSIAN_ENTROPY = (1.536, 2.183, 2.904, 3.676, 4.487, 5.328, 6.192, 7.064)

# Bits a weight that a layer gets at least and at most.
_LEAST, _MOST = 0.5, 7.0

# Largest bits a weight in the file of a grid of 3, 4, 5 and 6 bits. Such a grid has a step of about
# 2^(2 − rate) standard deviations, and levels up to four standard deviations and beyond.
_LARGEST_RATE = {3: 2.3, 4: 3.2, 5: 4.1, 6: 5.0}


def allocate_rates(bits: Mapping[str, int], sizes: Mapping[str, int], budget: float) -> dict[str, float]:
    """Return bits a weight of each layer in the file, so that they add up to a budget.

    A recipe says how sensitive layers are relative to each other. On fine grids each bit less in the file multiplies a
    layer's squared error by 4, wherever the layer starts from, so that the sum of the errors is least where all layers
    differ from the recipe's entropy by the same number of bits.

    Args:
        bits: recipe, 1 to 8 bits by layer name.
        sizes: number of weights by layer name.
        budget: bits of all codes together.

    Returns:
        Bits a weight by layer name, 0.5 to 7.

    Raises:
        ValueError: the budget is below the least or above the most bits of all layers.
    """
    total = sum(sizes[name] for name in bits)
    if not _LEAST * total <= budget <= _MOST * total:
        raise ValueError(f"{budget / total:.3f} bits a weight over {len(bits)} layers are outside {_LEAST} to {_MOST}")
    low, high = -8.0, 8.0
    for _ in range(60):
        middle = (low + high) / 2
        rates = _shifted(bits, middle)
        spent = sum(rates[name] * sizes[name] for name in bits)
        low, high = (middle, high) if spent <= budget else (low, middle)
    return _shifted(bits, low)


def _shifted(bits: Mapping[str, int], shift: float) -> dict[str, float]:
    return {name: min(max(GAUSSIAN_ENTROPY[n - 1] + shift, _LEAST), _MOST) for name, n in bits.items()}


def grid_of_rate(rate: float) -> int:
    """Return the bits of a grid wide enough that `rate` bits a weight in the file cut off no large weight."""
    return next((bits for bits, largest in _LARGEST_RATE.items() if rate <= largest), 7)
