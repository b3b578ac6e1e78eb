"""The integer grids that weights are rounded to (paper, section 3.1 "balance integer")."""

from __future__ import annotations

import math

MIN_BITS = 1
MAX_BITS = 8


def check_bits(bits: int, where: str = "bits") -> int:
    """Return `bits` if it is a width the codec has.

    Raises:
        ValueError: `bits` is not an integer from 1 to 8; the message names `where`.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{where} must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}")
    return bits


def half_range(bits: int) -> int:
    """Return the largest code: 2**(bits-1), or 127 at 8 bits, where 257 levels would not fit a byte."""
    return 127 if bits == 8 else 2 ** (bits - 1)


def levels(bits: int) -> int:
    """Return the number of balanced levels, 2**bits + 1 (255 at 8 bits)."""
    return 2 * half_range(bits) + 1


def code_range(bits: int, balance: bool = True) -> tuple[int, int]:
    """Return the smallest and the largest code.

    `balance=False` is the plain two's complement grid of 2**bits levels, kept for comparison: a subset of the
    balanced grid, so that both share one storage. 8 bits are symmetric either way.
    """
    high = half_range(bits)
    return -high, high if balance or bits == 8 else high - 1


def cost_in_bits(bits: int, balance: bool = True) -> float:
    """Return the bits a weight in the paper's accounting: log2 of the number of levels (8 at 8 bits)."""
    if bits == 8:
        return 8.0
    low, high = code_range(bits, balance)
    return math.log2(high - low + 1)
