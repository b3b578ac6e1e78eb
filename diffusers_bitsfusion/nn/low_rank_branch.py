"""A low-rank matrix beside what a layer computes: fused LoRAs, which rounding would lose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LowRankBranch(nn.Module):
    """Mixin of layers whose weight has a low-rank matrix added to it, up @ down, kept apart.

    Attributes:
        branch_down (`nn.Parameter | None`): floating [rank, in] or [rank, in, height, width].
        branch_up (`nn.Parameter | None`): floating [out, rank] or [out, rank, 1, 1].
    """

    branch_down: Any
    branch_up: Any

    @property
    def branch_rank(self) -> int:
        """Rank of the low-rank branch; 0 where there is none."""
        return 0 if self.branch_down is None else self.branch_down.shape[0]

    def extend_branch(self, down: Tensor, up: Tensor) -> None:
        """Add up @ down to the weight: down [rank, ...] and up [out, rank, ...], floating, as in `branch_shapes`."""
        weight: Any = self.weight
        down, up = (half.detach().to(weight.device, weight.dtype) for half in (down, up))
        if self.branch_rank:
            down, up = torch.cat([self.branch_down, down]), torch.cat([self.branch_up, up], dim=1)
        self._set_branch(down, up)

    def shrink_branch(self, rank: int) -> None:
        """Undo what `extend_branch` added after the branch had `rank`."""
        self._set_branch(self.branch_down[:rank], self.branch_up[:, :rank])

    def _set_branch(self, down: Tensor, up: Tensor) -> None:
        for name, half in (("branch_down", down), ("branch_up", up)):
            parameter = nn.Parameter(half.detach().clone(), requires_grad=False) if len(down) else None
            self.register_parameter(name, parameter)
            self._parameters[name] = parameter  # Under `init_empty_weights` it was put on the meta device.
