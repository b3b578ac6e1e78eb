"""Integer products in Triton, for GPUs: a GEMM, and the convolution as an implicit one, which torch lacks there.

Imported where Triton is installed only. Scales and bias are applied before the sums leave the registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_M, _BLOCK_N, _BLOCK_K = 128, 128, 64
_SMALL_BLOCK_M = 16


@triton.jit
def _store_scaled(
    out, sums, row_scale, weight_scale, bias, row, column, rows, columns, stride, HAS_BIAS: tl.constexpr
):
    """Store sums [BLOCK_M, BLOCK_N] times their scales, in fp32 and rounded once."""
    factors = tl.load(weight_scale + column, mask=column < columns, other=0.0)
    y = sums.to(tl.float32) * factors[None, :] * row_scale
    if HAS_BIAS:
        y += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    place = row[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _linear_kernel(
    x,
    weight,
    out,
    token_scale,
    weight_scale,
    bias,
    tokens,
    outputs,
    inputs,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[m, n] = token_scale[m] * weight_scale[n] * sum_k x[m, k] weight[n, k] + bias[n]"""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            x + row[:, None].to(tl.int64) * inputs + k[None, :],
            mask=(row[:, None] < tokens) & (k[None, :] < inputs),
            other=0,
        )
        b = tl.load(
            weight + column[None, :].to(tl.int64) * inputs + k[:, None],
            mask=(column[None, :] < outputs) & (k[:, None] < inputs),
            other=0,
        )
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    scales = tl.load(token_scale + row, mask=row < tokens, other=0.0)[:, None]
    _store_scaled(out, sums, scales, weight_scale, bias, row, column, tokens, outputs, outputs, HAS_BIAS)


def linear_triton(
    tokens: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Product of codes, scaled.

    Args:
        tokens: int8 [M, in], contiguous.
        token_scale: fp32 [M].
        weight: int8 [out, in], contiguous.
        weight_scale: fp32 [out].
        bias: floating [out].
        dtype: of the output.

    Returns:
        [M, out].
    """
    (rows, inputs), outputs = tokens.shape, weight.shape[0]
    out = torch.empty(rows, outputs, dtype=dtype, device=tokens.device)
    if rows == 0:
        return out
    block_m = _SMALL_BLOCK_M if rows <= _SMALL_BLOCK_M else _BLOCK_M
    with torch.cuda.device_of(tokens):  # Triton launches on the current device
        _linear_kernel[(triton.cdiv(rows, block_m), triton.cdiv(outputs, _BLOCK_N))](
            tokens,
            weight,
            out,
            token_scale,
            weight_scale,
            weight_scale if bias is None else bias,
            rows,
            outputs,
            inputs,
            HAS_BIAS=bias is not None,
            BLOCK_M=block_m,
            BLOCK_N=_BLOCK_N,
            BLOCK_K=_BLOCK_K,
        )
    return out


@triton.jit
def _conv_kernel(
    x,
    weight,
    out,
    image_scale,
    zero_point,
    weight_scale,
    bias,
    height,
    width,
    channels,
    out_height,
    out_width,
    outputs,
    rows,
    kernel_width,
    positions,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    groups,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A row is a pixel of the output, a column one of a group's `outputs`; sums run over kernel positions and the
    group's `channels`. Codes are shifted to int8; pixels outside have the code of zero, the zero point."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(2)
    zero = tl.load(zero_point) - 128
    image = row // (out_height * out_width)
    top = (row // out_width) % out_height * stride_h - padding_h
    left = row % out_width * stride_w - padding_w
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    weight_sums = tl.zeros((BLOCK_N,), dtype=tl.int32)
    output = group * outputs + column
    for position in range(positions):
        y = top + position // kernel_width * dilation_h
        x_ = left + position % kernel_width * dilation_w
        inside = (row < rows) & (y >= 0) & (y < height) & (x_ >= 0) & (x_ < width)
        pixel = (image.to(tl.int64) * height + y) * width + x_
        for start in range(0, channels, BLOCK_K):
            c = start + tl.arange(0, BLOCK_K)
            codes = tl.load(
                x + pixel[:, None] * (groups * channels) + group * channels + c[None, :],
                mask=inside[:, None] & (c[None, :] < channels),
                other=0,
            )
            shifted = tl.where(inside[:, None], codes.to(tl.int32) - 128, zero).to(tl.int8)
            b = tl.load(
                weight + (output[None, :].to(tl.int64) * positions + position) * channels + c[:, None],
                mask=(column[None, :] < outputs) & (c[:, None] < channels),
                other=0,
            )
            sums = tl.dot(shifted, b, sums, out_dtype=tl.int32)
            weight_sums += tl.sum(b.to(tl.int32), axis=0)
    sums -= zero * weight_sums[None, :]
    first = group * outputs
    _store_scaled(
        out + first,
        sums,
        tl.load(image_scale),
        weight_scale + first,
        bias + first,
        row,
        column,
        rows,
        outputs,
        groups * outputs,
        HAS_BIAS,
    )


def conv2d_triton(
    image: Tensor,
    image_scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """Convolution of codes, scaled.

    Args:
        image: uint8 [batch, in, height, width], channels last.
        image_scale: fp32 [1].
        zero_point: int32 [1], 0 to 255.
        weight: int8 [out, kernel height * kernel width, in / groups], contiguous.
        weight_scale: fp32 [out].
        bias: floating [out].
        kernel, stride, padding, dilation: pairs.
        dtype: of the output.

    Returns:
        [batch, out, height, width], channels last.
    """
    batch, _, height, width = image.shape
    outputs, positions, channels = weight.shape
    out_height, out_width = (
        (size + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i, size in enumerate((height, width))
    )
    out = torch.empty(
        (batch, outputs, out_height, out_width),
        dtype=dtype,
        device=image.device,
        memory_format=torch.channels_last,
    )
    rows = batch * out_height * out_width
    with torch.cuda.device_of(image):  # Triton launches on the current device
        _conv_kernel[(triton.cdiv(rows, _BLOCK_M), triton.cdiv(outputs // groups, _BLOCK_N), groups)](
            image,
            weight,
            out,
            image_scale,
            zero_point,
            weight_scale,
            weight_scale if bias is None else bias,
            height,
            width,
            channels,
            out_height,
            out_width,
            outputs // groups,
            rows,
            kernel[1],
            positions,
            *stride,
            *padding,
            *dilation,
            groups,
            HAS_BIAS=bias is not None,
            BLOCK_M=_BLOCK_M,
            BLOCK_N=_BLOCK_N,
            BLOCK_K=_BLOCK_K,
        )
    return out
