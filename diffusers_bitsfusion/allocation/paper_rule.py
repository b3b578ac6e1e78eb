"""The paper's bit assignment (paper, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# Exponent of a layer's size in its sensitivity score (paper, section 5).
ETA = 0.3
# Percentiles of the CLIP drop over layers, above each of which a layer gets one bit more (paper, section 5).
CLIP_PERCENTILES = (90, 95, 98)
# Bits of a layer whose score is too high at 1, 2 and 3 bits (paper, section 5).
_FALLBACK_BITS = 4


def paper_rule(
    sensitivity: Mapping[int, Mapping[str, float]],
    sizes: Mapping[str, int],
    cost: Mapping[str, Sequence[float]],
    budget: float,
    *,
    eta: float = ETA,
    clip_drop: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Return bits per layer by threshold: the smallest b in {1, 2, 3} whose S = M * N^-eta is below S_o, else 4.

    A layer whose CLIP score drops by more than the 90th percentile over layers gets one bit more, above the 95th
    another, above the 98th a third (paper, section 5). The paper leaves S_o open; here it is the strictest threshold
    that the budget allows.

    Args:
        sensitivity: M, by bits (1, 2, 3) and layer name; the paper takes the MSE of the images.
        sizes: N, number of weights by layer name.
        cost: cost of each layer at 1, 2, ... 7 bits, in the unit of `budget`.
        budget: cost of all layers together.
        eta: exponent of the size.
        clip_drop: drop of the CLIP score at 3 bits, by layer name; when left out, the threshold alone decides. A score
            that did not drop is never a reason for more bits.

    Returns:
        Bits, 1 to 7, by layer name.

    Raises:
        ValueError: the budget is below the cost of the most lenient threshold or above that of the strictest.
    """
    scores = {name: [sensitivity[bits][name] * size**-eta for bits in (1, 2, 3)] for name, size in sizes.items()}
    extra = _extra_bits(clip_drop, sizes)

    def assign(threshold: float) -> dict[str, int]:
        return {
            name: extra[name]
            + next((b for b, score in enumerate(by_bits, start=1) if score < threshold), _FALLBACK_BITS)
            for name, by_bits in scores.items()
        }

    def spent(threshold: float) -> float:
        return sum(cost[name][bits - 1] for name, bits in assign(threshold).items())

    # Thresholds from the most lenient to the strictest, between which the assignment changes; the cost rises along
    # them. No threshold is 0, so that a layer which never changes anything passes at 1 bit.
    positive = {score for by_bits in scores.values() for score in by_bits if score > 0}
    thresholds = [np.inf, *sorted(positive, reverse=True)]
    min_cost, max_cost = spent(thresholds[0]), spent(thresholds[-1])
    if not min_cost <= budget <= max_cost:
        total = sum(sizes.values())
        raise ValueError(
            f"no threshold of the paper's rule spends {budget / total:.3f} a weight over {len(sizes)} layers: it "
            f"spends {min_cost / total:.3f} to {max_cost / total:.3f}"
        )
    low, high = 0, len(thresholds) - 1  # Threshold 0 is within the budget.
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if spent(thresholds[middle]) <= budget else (low, middle - 1)
    return assign(thresholds[low])


def _extra_bits(clip_drop: Mapping[str, float] | None, layers: Mapping[str, int]) -> dict[str, int]:
    if clip_drop is None:
        return dict.fromkeys(layers, 0)
    percentiles = np.percentile(list(clip_drop.values()), CLIP_PERCENTILES)
    return {name: sum(max(p, 0.0) < clip_drop[name] for p in percentiles.tolist()) for name in layers}
