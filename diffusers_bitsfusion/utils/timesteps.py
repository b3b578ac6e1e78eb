"""Distributions of the timesteps that training samples (paper, section 6): uniform, Beta, or by any weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class TimestepDistribution:
    """Distribution over the timesteps 0 to len(weights) - 1, sampled by inverting its cumulative sum.

    Attributes:
        probabilities: [timesteps] float64, their sum is 1.

    Args:
        weights: [timesteps], not negative, in proportion to the probabilities.

    Raises:
        ValueError: the weights are negative, not finite or all zero.
    """

    def __init__(self, weights: np.ndarray) -> None:
        if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
            raise ValueError("Weights of timesteps must be finite, not negative and not all zero.")
        self.probabilities = weights / weights.sum()
        self._cumulative = torch.from_numpy(np.cumsum(self.probabilities))

    @classmethod
    def uniform(cls, num_timesteps: int) -> TimestepDistribution:
        """Return the uniform distribution."""
        return cls(np.ones(num_timesteps))

    @classmethod
    def beta(cls, num_timesteps: int, alpha: float = 3.0) -> TimestepDistribution:
        """Return Beta(alpha, 1) scaled to [0, num_timesteps) and rounded down; alpha is 3 in the paper (section 6).

        Raises:
            ValueError: `alpha` is not positive.
        """
        if not alpha > 0:
            raise ValueError(f"alpha of the Beta distribution must be positive, got {alpha}.")
        return cls(np.diff(np.linspace(0, 1, num_timesteps + 1) ** alpha))

    def __len__(self) -> int:
        return len(self.probabilities)

    def timesteps(self, uniform: Tensor) -> Tensor:
        """Return the timesteps, int64, for uniform random numbers in [0, 1) of any shape; they increase together."""
        indices = torch.searchsorted(self._cumulative, uniform.double(), right=True)
        return indices.clamp_max(len(self) - 1)
