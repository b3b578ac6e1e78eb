"""What a packed checkpoint says of itself."""

from __future__ import annotations

from collections.abc import Sequence


def branch_shapes(weight_shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a branch's two halves, (down, up), for a weight of `weight_shape`."""
    outputs, *inputs = weight_shape
    return (rank, *inputs), (outputs, rank, *(1 for _ in inputs[1:]))
