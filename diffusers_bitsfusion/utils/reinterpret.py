"""Memory of one dtype read as another."""

from __future__ import annotations

import torch
from torch import Tensor


def reinterpret(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x.view(dtype)`, in memory of its own where `torch.jit.trace` is at work, which cannot record it."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch.view_copy(x, dtype=dtype) if tracing else x.view(dtype)
