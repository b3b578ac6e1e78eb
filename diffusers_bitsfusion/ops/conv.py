"""The 2-D convolution on packed weights as one operator: exact or in integers, differentiable in input and bias.

One operator, so that `torch.compile` sees a single node and the decoded weight never leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input
from torch.utils.flop_counter import register_flop_formula

from .activations import quantize_image, rescale
from .decode import decode_channels_last, decode_to_scratch
from .dispatch import multiplies_blocks, takes_layout, wants_channels_last
from .onednn_float_weights import PackedOperand
from .onednn_float_weights import prepack_in_place as prepack_floats_in_place
from .onednn_weights import is_current, prepack, prepack_in_place
from .products import MAX_SUMS, Windows, block_codes, multiply_blocks

# Stride, padding, dilation, all as pairs, and groups.
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]


@torch.library.custom_op(
    "bitsfusion::conv2d",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int bits, SymInt[] shape, SymInt[] stride, "
        "SymInt[] padding, SymInt[] dilation, int groups, bool int8, Tensor? int8_weight) -> Tensor"
    ),
)
def conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    int8: bool,
    int8_weight: Tensor | None,
) -> Tensor:
    """y = x * W + b, with zero padding.

    Args:
        x: floating [batch, in, height, width].
        codes: uint8 [out, dense_width(in / groups * kernel, bits)], the dense form of `codec.radix`.
        scale: int32 [out], the bits of the fp32 scales.
        bias: [out] in the dtype of `x`.
        bits: 1 to 8.
        shape: (out, in / groups, kernel height, kernel width).
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`, the first three as pairs.
        int8: whether `x` is rounded to 8 bits, with one scale and zero point, and multiplied in integers. Gradients
            are those of the exact layer.
        int8_weight: what `int8_conv_weight` made of the codes, if that is kept; only looked at with `int8`.

    Returns:
        [batch, out, height, width] in the dtype of `x`; channels last with `int8` or where `wants_channels_last`.
    """
    geometry = stride, padding, dilation, groups
    if not int8:
        packed = PackedOperand(codes, scale.view(torch.float32), bits, tuple(shape), geometry)
        y = _convolve(x, packed, bias, geometry)
        return _channels_last(y) if wants_channels_last(x, int8, shape[0]) else y
    if x.shape[1] != groups * shape[1]:  # The kernels do not check it.
        raise RuntimeError(
            f"Given groups={groups}, weight of size {list(shape)}, expected input{list(x.shape)} to have "
            f"{groups * shape[1]} channels, but got {x.shape[1]} channels instead"
        )
    if x.numel() == 0:
        return _channels_last(F.conv2d(x, x.new_empty(shape), None, *geometry))
    in_blocks = multiplies_blocks(codes.device, bits, groups)
    if int8_weight is None or not (in_blocks or _is_current(int8_weight)):
        int8_weight = int8_conv_weight(codes, scale, bits, shape, geometry, kept=False)
    weight_scale = scale.view(torch.float32)
    if in_blocks:
        y = _multiply_blocks(x, int8_weight, weight_scale, bias, bits, shape, geometry)
    else:
        multiply = _multiply_on_gpu if x.device.type == "cuda" else _multiply_by_onednn
        y = multiply(x, int8_weight, weight_scale, bias, shape, geometry)
    return _channels_last(y.to(x.dtype))


def _multiply_blocks(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    shape: Sequence[int],
    geometry: Geometry,
) -> Tensor:
    stride, padding, dilation, _ = geometry
    out = F.conv2d(x.to("meta"), x.new_empty(shape, device="meta"), None, *geometry)  # It is asked for its sizes.
    windows = Windows(x.shape[2:], out.shape[2:], shape[2:], stride, padding, dilation)
    image, image_scale, zero_point = quantize_image(_channels_last(x))
    image = _channels_last(image).permute(0, 2, 3, 1)
    # No view of another tensor, which autograd would forbid changing in place.
    y = torch.empty(out.shape, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
    positions = y.permute(0, 2, 3, 1).view(-1, shape[0])
    rows = max(1, min(len(positions), MAX_SUMS // shape[0]))
    sums = torch.empty(rows, shape[0], dtype=torch.int32, device="cpu")
    position_scale = image_scale.expand(rows).contiguous()
    for first in range(0, len(positions), rows):
        part = positions[first : first + rows]
        multiply_blocks(image, int(zero_point), weight, bits, windows, first, sums[: len(part)])
        rescale(sums[: len(part)], position_scale[: len(part)], scale, bias, part)
    return y


def _convolve(x: Tensor, packed: PackedOperand, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Compute the exact convolution by the fastest kernel."""
    weight = prepack_floats_in_place(packed, x) if _takes_layout(x, packed.shape, geometry) else None
    if weight is not None:
        stride, padding, dilation, groups = geometry
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            _channels_last(x), weight, bias, padding, stride, dilation, groups, "none", [], ""
        )
        return y
    on_gpu = x.device.type == "cuda" and wants_channels_last(x, False, packed.shape[0])
    decode = decode_channels_last if on_gpu else decode_to_scratch
    return F.conv2d(x, decode(packed.codes, packed.scale, packed.bits, packed.shape, x.dtype), bias, *geometry)


def _takes_layout(x: Tensor, shape: Sequence[int], geometry: Geometry) -> bool:
    """Whether oneDNN may be given a weight in its own layout, and a valid input, at whose sizes it does not look."""
    *_, groups = geometry
    fits = groups == 1 and x.dim() == 4 and x.numel() > 0 and x.shape[1] == shape[1]
    return fits and takes_layout(x, shape[0])


def _is_current(int8_weight: Tensor) -> bool:
    """Whether a kept weight is in the form that is fastest now: on a CPU that depends on the number of threads."""
    return int8_weight.device.type == "cuda" or is_current(int8_weight)


def _multiply_by_onednn(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, shape: Sequence[int], geometry: Geometry
) -> Tensor:
    image, image_scale, zero_point = quantize_image(x)
    y: Tensor = torch.ops.onednn.qconv2d_pointwise.tensor(
        _channels_last(image),
        image_scale,
        zero_point,
        weight,
        scale,
        torch.zeros_like(scale, dtype=torch.int32),  # These are the weights' zero points.
        None if bias is None else bias.to(torch.float32),
        *geometry,
        1.0,  # This is the output's scale.
        0,  # This is the output's zero point.
        x.dtype if x.dtype == torch.bfloat16 else torch.float32,
        "none",  # No operation follows.
        [],
        "",
    )
    return y


def _multiply_on_gpu(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, shape: Sequence[int], geometry: Geometry
) -> Tensor:
    # It imports Triton, which takes a second and may be missing.
    from .triton.activations import quantize_image_triton
    from .triton.int8_conv import conv2d_triton

    stride, padding, dilation, groups = geometry
    image = quantize_image_triton(_channels_last(x), padding)
    return conv2d_triton(*image, weight, scale, bias, shape[2:], stride, dilation, groups, x.dtype)


@conv2d.register_fake
def _(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int, shape: Sequence[int], *others: Any
) -> Tensor:
    *geometry, int8, _ = others
    y = F.conv2d(x, x.new_empty(shape), None, *geometry)
    return _channels_last(y) if int8 or wants_channels_last(x, int8, shape[0]) else y


@torch.library.custom_op(
    "bitsfusion::conv2d_input_grad",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor codes, Tensor scale, int bits, SymInt[] input_shape, SymInt[] shape, SymInt[] stride, "
        "SymInt[] padding, SymInt[] dilation, int groups) -> Tensor"
    ),
)
def conv2d_input_grad(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    bits: int,
    input_shape: Sequence[int],
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of the exact layer's input, `input_shape`; `grad` is that of its output, the rest as in `conv2d`."""
    weight = decode_to_scratch(codes, scale.view(torch.float32), bits, tuple(shape), grad.dtype)
    grad_x: Tensor = conv2d_input(input_shape, weight, grad, stride, padding, dilation, groups)
    return grad_x


@conv2d_input_grad.register_fake
def _(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    bits: int,
    input_shape: Sequence[int],
    shape: Sequence[int],
    *geometry: Any,
) -> Tensor:
    grad_x: Tensor = conv2d_input(input_shape, grad.new_empty(shape), grad, *geometry)
    return grad_x


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, ctx.bits, _, *ctx.settings = inputs
    ctx.save_for_backward(codes, scale)


def _second_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the gradient once more: it is linear in that of the output."""
    return conv2d(grad, *ctx.saved_tensors, None, ctx.bits, *ctx.settings, False, None), *[None] * 9


conv2d_input_grad.register_autograd(_second_backward, setup_context=_setup_second)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, _, ctx.bits, *ctx.settings, _, _ = inputs
    ctx.input_shape = x.shape
    ctx.save_for_backward(codes, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = conv2d_input_grad(grad, *ctx.saved_tensors, ctx.bits, ctx.input_shape, *ctx.settings)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, None, None, grad_bias, *[None] * 8


conv2d.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.bitsfusion.conv2d)
def _(
    x: Any, codes: Any, scale: Any, bias: Any, bits: int, shape: Sequence[int], *_: Any, out_shape: torch.Size
) -> int:
    return 2 * out_shape.numel() * math.prod(shape[1:])


@register_flop_formula(torch.ops.bitsfusion.conv2d_input_grad)
def _(
    grad: torch.Size, codes: Any, scale: Any, bits: int, input_shape: Any, shape: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * grad.numel() * math.prod(shape[1:])


def int8_conv_weight(
    codes: Tensor, scale: Tensor, bits: int, shape: Sequence[int], geometry: Geometry, kept: bool = True
) -> Tensor:
    """Return the codes as `conv2d` multiplies them; unless `kept`, the next call may write them over.

    The arguments are those of `conv2d`.

    Returns:
        int8; on a CPU in an opaque layout of oneDNN, or without VNNI and groups `products.block_codes`; on a GPU
        [out, kernel height * kernel width, in / groups].
    """
    if multiplies_blocks(codes.device, bits, geometry[-1]):
        return block_codes(codes, scale.view(torch.float32), bits, shape, kept)
    if codes.device.type == "cuda":
        weight = decode_channels_last(codes, scale.view(torch.float32), bits, tuple(shape), torch.int8)
        return weight.permute(0, 2, 3, 1).flatten(1, 2)
    plain = decode_to_scratch(codes, scale.view(torch.float32), bits, tuple(shape), torch.int8)
    arrange = prepack if kept else prepack_in_place
    return arrange(plain, scale.view(torch.float32), geometry)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
