"""Gated activations of diffusers' models, computed together with their packed projection."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from ..ops.transforms import in_transform
from .linear import BitsFusionLinear


class FusedGEGLU(GEGLU):
    """`GEGLU` in one operation with its projection, in integers or in bf16 on a CPU, where no derivative is asked for.

    Exact calls in other dtypes are diffusers' own: the operation rounds its gate to fp32 a little differently.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the gated activation of `hidden_states`, as `GEGLU` does."""
        proj = self.proj
        fuses = isinstance(proj, BitsFusionLinear) and not proj.branch_rank and self._gains(proj, hidden_states)
        fuses = fuses and not proj._forward_hooks  # They are shown what the projection alone gives.
        output: Tensor
        if fuses and not self._differentiates(hidden_states, proj.bias):
            output = proj(hidden_states, geglu=True)
        else:
            output = super().forward(hidden_states, *args, **kwargs)
        return output

    def _gains(self, proj: BitsFusionLinear, x: Tensor) -> bool:
        if proj.computes_int8:
            return True
        return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu")

    def _differentiates(self, *inputs: Tensor | None) -> bool:
        gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        return gradient or in_transform()


def set_geglu(model: nn.Module, fused: bool) -> None:
    """Make every `GEGLU` a `FusedGEGLU`, or the other way round; modules of other classes are left alone."""
    old, new = (GEGLU, FusedGEGLU) if fused else (FusedGEGLU, GEGLU)
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new
