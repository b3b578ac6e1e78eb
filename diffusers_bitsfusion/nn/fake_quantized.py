"""Layers for quantization-aware training: float latent weights, rounded in every call (paper, section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codec.grid import code_range, half_range
from ..codec.quantize_dense import quantize_to_dense
from ..codec.rounding import Rounding
from ..codec.scales import round_scale, round_to_codes
from .packed import autocast, without_weight

LayerT = TypeVar("LayerT", bound="FakeQuantizedWeight")

# Share of a step that latent weights which are made to round to a given code stay away from it at most; the rest is
# room for rounding errors before the next code begins.
_WITHIN = 0.49

# Smallest scale: a step of the optimizer may carry one across zero; it is held here, and its gradient leads back.
LEAST_SCALE = 1e-8


class FakeQuantizedWeight(nn.Module):
    """Mixin before `nn.Linear` or `nn.Conv2d` whose weight is rounded to the grid in every call.

    The gradient goes straight through the rounding to the latent weight where that lies within the grid's range
    (within half a step of its ends), and is zero beyond. The scale's is that of LSQ (arXiv 1902.08153). The layer
    follows its input's dtype, or autocast's; the rounding itself is done in fp32.

    Attributes:
        weight (`nn.Parameter`): fp32 latent weight, shaped as in the float layer.
        scale (`nn.Parameter`): fp32 [out].
        bits (`int`): 1 to 8.
        balance (`bool`): 2**bits + 1 symmetric levels, or the plain grid of 2**bits.
        scale_dtype (`str`): "float32", or "bfloat16" to round with scales that have 16 bits in the file.
    """

    bits: int
    balance: bool
    scale_dtype: str = "float32"
    weight: Any
    bias: Any
    scale: nn.Parameter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise TypeError(
            f"{name} has no constructor: it is made from a layer with weights. Call prepare_qat(model, config) on a "
            f"model, or {name}.from_float(layer, bits) on a single layer."
        )

    @classmethod
    def from_float(
        cls: type[LayerT],
        layer: nn.Linear | nn.Conv2d,
        bits: int,
        rounding: Rounding = Rounding(),
        scale_dtype: str = "float32",
    ) -> LayerT:
        """Return the fake-quantized layer of a Linear or Conv2d, with the scales that quantizing gives; a copy.

        Raises:
            ValueError: the weight holds NaN or infinite values.
        """
        prepared = without_weight(cls, layer)
        prepared.bits, prepared.balance, prepared.scale_dtype = bits, rounding.balance, scale_dtype
        weight = layer.weight.detach()
        _, scale = quantize_to_dense(weight.flatten(1), bits, rounding)
        prepared.weight = nn.Parameter(weight.to(torch.float32, copy=True))
        prepared.scale = nn.Parameter(scale)
        bias = (
            layer.bias if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
        )
        prepared.register_parameter("bias", bias)
        return prepared

    @torch.no_grad()
    def start_from(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Make the layer round to given codes: each latent weight moves as little as it must.

        Args:
            codes: integers [out, columns] within the grid.
            scale: fp32 [out], positive.
            bias: [out], or None to keep the layer's.
        """
        codes, row_scale = codes.to(self.weight), scale.to(self.weight).unsqueeze(1)
        nearest = self.weight.flatten(1).clamp((codes - _WITHIN) * row_scale, (codes + _WITHIN) * row_scale)
        self.weight.copy_(nearest.view_as(self.weight))
        self.scale.copy_(scale)
        if bias is not None:
            self.bias.copy_(bias)

    @property
    def rounded_scale(self) -> Tensor:
        """The scale as the file will hold it, fp32 [out]; gradients go straight through its rounding."""
        return round_scale(self.scale, self.scale_dtype)

    @torch.no_grad()
    def codes_and_scale(self) -> tuple[Tensor, Tensor]:
        """Codes fp32 [out, columns] and scale fp32 [out] of the weight as it is now."""
        scale = self.rounded_scale.float().clamp_min(LEAST_SCALE)
        return round_to_codes(self.weight.flatten(1).float(), scale, self.bits, self.balance), scale

    def extra_repr(self) -> str:
        """Return what a printed model shows of the layer."""
        return f"{super().extra_repr()}, bits={self.bits}"


def _rounded(weight: Tensor, scale: Tensor, bits: int, balance: bool) -> Tensor:
    """Return the latent weight [out, ...] on its grid, fp32 of the same shape."""
    scale = scale.float().clamp_min(LEAST_SCALE)
    return round_to_codes(weight.flatten(1).float(), scale, bits, balance).mul_(scale.unsqueeze(1)).view_as(weight)


def straight_through(
    grad: Tensor, weight: Tensor, scale: Tensor, bits: int, balance: bool = True
) -> tuple[Tensor, Tensor]:
    """Gradients of the latent weight and of its scales, from the gradient of the rounded weight.

    With v = weight / scale and codes k = clip(round(v)): the weight's is `grad` where rounding v does not clip, else
    0. The scale's is the sum over its row of grad * (k - v), of grad * k where clipped, divided by
    sqrt(columns * largest code) as in LSQ, which keeps the two kinds of gradient alike in size.

    Args:
        grad: floating, as `weight`; overwritten with the weight's gradient where it is fp32.
        weight: latent weight [out, ...], floating.
        scale: floating [out].
        bits: 1 to 8.
        balance: as in `codec.grid.code_range`.

    Returns:
        fp32 gradients, of the weight's and the scale's shape.
    """
    rows = grad.flatten(1).float()
    inside, slope = _slopes(weight, scale, bits, balance)
    grad_scale = torch.linalg.vecdot(rows, slope) * _scale_factor(weight, bits)
    return rows.mul_(inside).view_as(weight), grad_scale


def _slopes(weight: Tensor, scale: Tensor, bits: int, balance: bool) -> tuple[Tensor, Tensor]:
    """Return the rounded weight's derivatives, [out, columns]: by the latent weight, boolean; by the scale, fp32."""
    low, high = code_range(bits, balance)
    scale = scale.float().clamp_min(LEAST_SCALE)
    exact = weight.flatten(1).float() * scale.reciprocal().unsqueeze(1)
    nearest = exact.round()
    codes = nearest.clamp(low, high)
    inside = nearest == codes
    return inside, codes.sub_(exact.mul_(inside))


def _scale_factor(weight: Tensor, bits: int) -> float:
    """Factor of the derivatives by the scales (LSQ, section 2.2)."""
    return 1 / math.sqrt(weight[0].numel() * half_range(bits))


def _output_tangent(ctx: Any, multiply: Callable[[Tensor, Tensor], Tensor], tangents: tuple[Any, ...]) -> Tensor:
    """Return the tangent of a layer's output without its bias', of which the backward pass is the transpose.

    Args:
        ctx: with the input, the latent weight and the scales saved, and bits and balance as `grid`.
        multiply: the layer's product, or convolution, of an input and a weight.
        tangents: of these three, each of which may be None.
    """
    x, weight, scale = ctx.saved_tensors
    by_x, by_weight, by_scale = tangents
    inside, slope = _slopes(weight, scale, *ctx.grid)
    rounded = torch.zeros_like(slope) if by_weight is None else by_weight.flatten(1).float() * inside
    if by_scale is not None:
        rounded = rounded + slope * (by_scale.float() * _scale_factor(weight, ctx.grid[0])).unsqueeze(1)
    y = multiply(x, rounded.view_as(weight).to(x.dtype))
    return y if by_x is None else y + multiply(by_x, _rounded(weight, scale, *ctx.grid).to(x.dtype))


class _RoundedLinear(torch.autograd.Function):
    """y = x Q(W)^T + b, rounding again in the backward pass rather than keeping Q(W)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int, balance: bool) -> Tensor:
        """Return the layer's output with the rounded weight, in the dtype of `x` or autocast's."""
        return F.linear(x, _rounded(weight, scale, bits, balance).to(x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward pass needs."""
        x, weight, scale, _, *ctx.grid = inputs
        ctx.save_for_backward(x, weight, scale)
        ctx.save_for_forward(x, weight, scale)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Return the tangent of the output, in forward-mode differentiation."""
        *inner, bias, _, _ = tangents
        y = _output_tangent(ctx, F.linear, tuple(inner))
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, scale = ctx.saved_tensors
        grad_x = grad_weight = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _rounded(weight, scale, *ctx.grid).to(grad.dtype)
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight, grad_scale = straight_through(flat.T @ x.reshape(-1, x.shape[-1]), weight, scale, *ctx.grid)
        grad_bias = flat.sum(0) if ctx.needs_input_grad[3] else None
        return grad_x, grad_weight, grad_scale, grad_bias, None, None


_rounded_linear: Callable[..., Tensor] = _RoundedLinear.apply


class QATLinear(FakeQuantizedWeight, nn.Linear):
    """`torch.nn.Linear` in quantization-aware training; see `FakeQuantizedWeight`. Built by `prepare_qat`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output with the rounded weight, in the dtype of `x` or autocast's."""
        x = autocast(input)
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        return _rounded_linear(x, self.weight, self.rounded_scale, bias, self.bits, self.balance)


class _RoundedConv2d(torch.autograd.Function):
    """y = x * Q(W) + b with numeric zero padding, rounding again in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        layer: QATConv2d,
        padding: tuple[int, ...],
    ) -> Tensor:
        """Return the layer's output with the rounded weight, in the dtype of `x` or autocast's."""
        rounded = _rounded(weight, scale, layer.bits, layer.balance).to(x.dtype)
        return F.conv2d(x, rounded, bias, layer.stride, padding, layer.dilation, layer.groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward pass needs."""
        x, weight, scale, _, layer, padding = inputs
        ctx.save_for_backward(x, weight, scale)
        ctx.save_for_forward(x, weight, scale)
        ctx.grid = layer.bits, layer.balance
        ctx.geometry = layer.stride, padding, layer.dilation, layer.groups

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Return the tangent of the output, in forward-mode differentiation."""
        *inner, bias, _, _ = tangents
        y = _output_tangent(ctx, lambda x, weight: F.conv2d(x, weight, None, *ctx.geometry), tuple(inner))
        return y if bias is None else y + bias.view(-1, 1, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, scale = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        needs_x, needs_weight, needs_scale, needs_bias = ctx.needs_input_grad[:4]
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            x,
            _rounded(weight, scale, *ctx.grid).to(x.dtype),
            [weight.shape[0]],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [needs_x, needs_weight or needs_scale, needs_bias],
        )
        grad_scale = None
        if grad_weight is not None:
            grad_weight, grad_scale = straight_through(grad_weight, weight, scale, *ctx.grid)
        return grad_x, grad_weight, grad_scale, grad_bias, None, None


_rounded_conv2d: Callable[..., Tensor] = _RoundedConv2d.apply


class QATConv2d(FakeQuantizedWeight, nn.Conv2d):
    """`torch.nn.Conv2d` in quantization-aware training; see `FakeQuantizedWeight`. Built by `prepare_qat`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output with the rounded weight, in the dtype of `x` or autocast's."""
        if input.dim() == 3:  # nn.Conv2d takes an image without a batch, too.
            return self.forward(input.unsqueeze(0)).squeeze(0)
        x = autocast(input)
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        return _rounded_conv2d(x, self.weight, self.rounded_scale, bias, self, padding)


def fake_quantized_from_float(
    layer: nn.Linear | nn.Conv2d, bits: int, rounding: Rounding = Rounding(), scale_dtype: str = "float32"
) -> QATLinear | QATConv2d:
    """Return the fake-quantized layer of an `nn.Linear` or `nn.Conv2d`.

    The arguments are those of `FakeQuantizedWeight.from_float`.

    Raises:
        ValueError: the weight holds NaN or infinite values.
    """
    kind: type[QATConv2d | QATLinear] = QATConv2d if isinstance(layer, nn.Conv2d) else QATLinear
    return kind.from_float(layer, bits, rounding, scale_dtype)
