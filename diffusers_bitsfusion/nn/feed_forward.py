"""Gated activations of diffusers' models beside packed layers that compute in integers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from ..ops.forward_mode import in_forward_mode
from .linear import BitsFusionLinear


class IntegerGEGLU(GEGLU):
    """`GEGLU` in one operation with its projection, where that computes in integers and no derivative is asked for."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        proj = self.proj
        if not isinstance(proj, BitsFusionLinear) or not proj.computes_int8 or proj.branch_rank:
            return super().forward(hidden_states, *args, **kwargs)
        inputs = hidden_states, proj.bias
        gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        if gradient or in_forward_mode():
            return super().forward(hidden_states, *args, **kwargs)
        return proj(hidden_states, geglu=True)


def set_geglu(model: nn.Module, integers: bool) -> None:
    """Make every `GEGLU` an `IntegerGEGLU`, or the other way round; modules of other classes are left alone."""
    old, new = (GEGLU, IntegerGEGLU) if integers else (IntegerGEGLU, GEGLU)
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new
