"""How weights are rounded to their grid: the settings that travel together from the config to the codec."""

from __future__ import annotations

from dataclasses import dataclass

from ..utils.json_files import is_count
from .schema import check_balance

SCALE_INITS = ("alternating", "minmax")


@dataclass(frozen=True)
class Rounding:
    """Settings of rounding.

    Attributes:
        scale_init: "alternating" (codes given the scale, scale given the codes; paper, section 3.2) or "minmax"
            (largest magnitude over largest code), which the paper compares with.
        iterations: rounds of the alternation.
        balance: 2**bits + 1 symmetric levels (paper, section 3.1); False for the plain grid of 2**bits.

    Raises:
        ValueError: a value is impossible; the message has the name that the argument has in `BitsFusionConfig`.
    """

    scale_init: str = "alternating"
    iterations: int = 10
    balance: bool = True

    def __post_init__(self) -> None:
        if self.scale_init not in SCALE_INITS:
            raise ValueError(f"scale_init must be one of {SCALE_INITS}, got {self.scale_init!r}")
        if not is_count(self.iterations):
            raise ValueError(f"scale_iterations must be an integer from 0, got {self.iterations!r}")
        check_balance(self.balance)
