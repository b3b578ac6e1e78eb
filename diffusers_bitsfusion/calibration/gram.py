"""Sums of outer products, in half the memory."""

from __future__ import annotations

import torch
from torch import Tensor

# Number of rows of a strip: small enough to hold little more than half of the matrix, large enough for a fast GEMM.
_STRIP = 256


def strip_shapes(size: int) -> list[tuple[int, int]]:
    """Return (rows, columns) of the strips that hold the upper triangle of a matrix [size, size]."""
    return [(min(_STRIP, size - first), size - first) for first in range(0, size, _STRIP)]


def gram_numel(size: int) -> int:
    """Return how many numbers a `Gram` of `size` columns holds."""
    return sum(rows * columns for rows, columns in strip_shapes(size))


class Gram:
    """Sum of rowᵀ row, a symmetric matrix of which one triangle is stored: half the memory and half the arithmetic.

    Args:
        size: number of columns of the rows.
        device: device of the sum.

    Attributes:
        values: fp32 [gram_numel(size)], the strips one after another.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.values = torch.zeros(gram_numel(size), dtype=torch.float32, device=device)
        shapes = strip_shapes(size)
        parts = self.values.split([rows * columns for rows, columns in shapes])
        self._strips = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        self._size = size

    def add(self, rows: Tensor) -> None:
        """Add rowᵀ row of rows, fp32 [positions, size]."""
        for first, strip in self._placed():
            strip.addmm_(rows[:, first : first + _STRIP].T, rows[:, first:])

    def diagonal(self) -> Tensor:
        """Return the diagonal, fp32 [size]."""
        return torch.cat([strip.diagonal() for strip in self._strips])

    def full(self) -> Tensor:
        """Return the whole matrix, fp32 [size, size]."""
        full = self.values.new_empty(self._size, self._size)
        for first, strip in self._placed():
            full[first : first + _STRIP, first:] = strip
            full[first:, first : first + _STRIP] = strip.T
        return full

    def _placed(self) -> zip[tuple[int, Tensor]]:
        """Return (first row, which is also the first column; strip) of each strip."""
        return zip(range(0, self._size, _STRIP), self._strips, strict=True)
