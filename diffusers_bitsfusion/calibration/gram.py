"""Sums of outer products, in half the memory."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a strip: above half of the matrix by little, and products that a GEMM is still fast at.
_STRIP = 256


def strip_shapes(size: int) -> list[tuple[int, int]]:
    """Rows and columns of the strips that hold the upper triangle of a matrix [size, size], from the diagonal on."""
    return [(min(_STRIP, size - first), size - first) for first in range(0, size, _STRIP)]


def gram_numel(size: int) -> int:
    """Numbers that a `Gram` of so many columns holds."""
    return sum(rows * columns for rows, columns in strip_shapes(size))


class Gram:
    """Sum of rowᵀ row, a symmetric matrix, of which one triangle is kept: half the memory and half the arithmetic.

    Args:
        size: columns of the rows.
        device: to sum on.

    Attributes:
        values: fp32 [gram_numel(size)], the strips one after another.
    """

    def __init__(self, size: int, device: torch.device):
        self.values = torch.zeros(gram_numel(size), dtype=torch.float32, device=device)
        shapes = strip_shapes(size)
        parts = self.values.split([rows * columns for rows, columns in shapes])
        self._strips = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        self._size = size

    def add(self, rows: Tensor) -> None:
        """Count in rows fp32 [positions, size]."""
        for first, strip in self._placed():
            strip.addmm_(rows[:, first : first + _STRIP].T, rows[:, first:])

    def diagonal(self) -> Tensor:
        """fp32 [size]."""
        return torch.cat([strip.diagonal() for strip in self._strips])

    def full(self) -> Tensor:
        """Both triangles, fp32 [size, size]."""
        full = self.values.new_empty(self._size, self._size)
        for first, strip in self._placed():
            full[first : first + _STRIP, first:] = strip
            full[first:, first : first + _STRIP] = strip.T
        return full

    def _placed(self) -> zip[tuple[int, Tensor]]:
        """First row, and column, of each strip, and the strip."""
        return zip(range(0, self._size, _STRIP), self._strips, strict=True)
