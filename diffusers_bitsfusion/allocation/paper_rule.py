"""The paper's bit assignment (paper, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# Size exponent; percentiles of the CLIP drop above which a layer gets one bit more each (paper, section 5).
ETA = 0.3
CLIP_PERCENTILES = (90, 95, 98)

_WITHOUT = 4  # bits of a layer that is too sensitive at all measured ones


def paper_rule(
    damage: Mapping[int, Mapping[str, float]],
    sizes: Mapping[str, int],
    cost: Mapping[str, Sequence[float]],
    budget: float,
    *,
    eta: float = ETA,
    clip_drop: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Bits per layer by threshold: the smallest b in {1, 2, 3} whose S = M * N^-eta is below S_o, else 4.

    A layer whose CLIP score drops by more than the 90th percentile over layers gets one bit more, above the 95th
    another, above the 98th a third. S_o, open in the paper, is the largest demand that the budget allows.

    Args:
        damage: M, by bits (1, 2, 3) and layer; the paper's is the MSE of the pictures.
        sizes: N, weights by layer.
        cost: of each layer at 1 to 7 bits, in the unit of `budget`.
        budget: that all layers may take together.
        eta: exponent of the size.
        clip_drop: drop of the CLIP score at 3 bits, by layer; when left out, the threshold alone decides. A score that
            did not drop is never a reason for more bits.

    Returns:
        Bits, 1 to 7, by layer.

    Raises:
        ValueError: the budget is below what the lowest demand takes or above what the highest does.
    """
    scores = {name: [damage[bits][name] * size**-eta for bits in (1, 2, 3)] for name, size in sizes.items()}
    extra = _extra_bits(clip_drop, sizes)

    def assign(threshold: float) -> dict[str, int]:
        return {
            name: next((b for b, score in enumerate(by_bits, start=1) if score < threshold), _WITHOUT) + extra[name]
            for name, by_bits in scores.items()
        }

    def spent(threshold: float) -> float:
        return sum(cost[name][bits - 1] for name, bits in assign(threshold).items())

    # From the most lenient threshold to the strictest, between which the assignment changes; cost rises on the way.
    # No threshold is 0, so that a layer which never changes anything passes at 1 bit.
    positive = {score for by_bits in scores.values() for score in by_bits if score > 0}
    thresholds = [np.inf, *sorted(positive, reverse=True)]
    least, most = spent(thresholds[0]), spent(thresholds[-1])
    if not least <= budget <= most:
        total = sum(sizes.values())
        raise ValueError(
            f"no threshold of the paper's rule spends {budget / total:.3f} a weight over {len(sizes)} layers: it "
            f"spends {least / total:.3f} to {most / total:.3f}"
        )
    low, high = 0, len(thresholds) - 1  # the first fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if spent(thresholds[middle]) <= budget else (low, middle - 1)
    return assign(thresholds[low])


def _extra_bits(clip_drop: Mapping[str, float] | None, layers: Mapping[str, int]) -> dict[str, int]:
    if clip_drop is None:
        return dict.fromkeys(layers, 0)
    percentiles = np.percentile(list(clip_drop.values()), CLIP_PERCENTILES)
    return {name: sum(max(p, 0.0) < clip_drop[name] for p in percentiles.tolist()) for name in layers}
