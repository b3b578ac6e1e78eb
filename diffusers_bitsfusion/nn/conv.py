"""2-D convolution on packed weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from .packed import PackedWeight, autocast, needs_grad


class _PackedConv2d(torch.autograd.Function):
    """y = x * W + b with numeric zero padding, keeping codes instead of W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: BitsFusionConv2d, padding: tuple[int, ...]) -> Tensor:
        ctx.layer, ctx.padding, ctx.input_shape = layer, padding, x.shape
        return layer.convolve(x, bias, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        layer = ctx.layer
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = layer.decode_for_call(grad.dtype)
            grad_x = conv2d_input(
                ctx.input_shape, weight, grad, layer.stride, ctx.padding, layer.dilation, layer.groups
            )
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_bias, None, None


class BitsFusionConv2d(PackedWeight, nn.Conv2d):
    """`torch.nn.Conv2d` whose weight is kept as packed codes and per-output-channel scales.

    Built by `quantize_model` or `from_pretrained`; constructed directly it is an ordinary float layer. Attributes:
    see `PackedWeight`, and `bias` as in `nn.Conv2d`. Every stride, dilation, group count and padding mode works.
    Differentiable in its input and bias, not in codes or scales.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_packed:
            return super().forward(x)
        if x.dim() == 3:  # an image without a batch, as nn.Conv2d takes
            return self.forward(x.unsqueeze(0)).squeeze(0)
        x = autocast(x)
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        x, padding = self._pad(x)
        if needs_grad(x, bias):
            y = _PackedConv2d.apply(x, bias, self, padding)
        else:
            y = self.convolve(x, bias, padding)
        return y + self._branch(x, padding) if self.branch_rank else y

    def convolve(self, x: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
        """The convolution with zero padding of `padding` rows and columns."""
        weight = self.decode_for_call(x.dtype)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _branch(self, x: Tensor, padding: tuple[int, ...]) -> Tensor:
        hidden = F.conv2d(x, self.branch_down.to(x.dtype), None, self.stride, padding, self.dilation)
        return F.conv2d(hidden, self.branch_up.to(x.dtype))

    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Padding that is not plain zeros of a given width, done ahead: (padded input, padding left to do)."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return x, self.padding
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
