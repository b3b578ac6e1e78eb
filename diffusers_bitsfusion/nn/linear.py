"""Linear layer on packed weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .packed import PackedWeight, autocast, needs_grad


class _PackedLinear(torch.autograd.Function):
    """y = x W^T + b, keeping codes instead of W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: BitsFusionLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.decode_for_call(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = grad @ ctx.layer.decode_for_call(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


class BitsFusionLinear(PackedWeight, nn.Linear):
    """`torch.nn.Linear` whose weight is kept as packed codes and per-output-channel scales.

    Built by `quantize_model` or `from_pretrained`; constructed directly it is an ordinary float layer. Attributes:
    see `PackedWeight`, and `bias` as in `nn.Linear`. Differentiable in its input and bias, not in codes or scales.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_packed:
            return super().forward(x)
        x = autocast(x)
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        if needs_grad(x, bias):
            y = _PackedLinear.apply(x, bias, self)
        else:
            y = F.linear(x, self.decode_for_call(x.dtype), bias)
        return y + self._branch(x) if self.branch_rank else y

    def _branch(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.branch_down.to(x.dtype)), self.branch_up.to(x.dtype))
