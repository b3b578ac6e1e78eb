"""Activations to eight bits in Triton, for GPUs: codes and scales of `activations`' references, bit for bit.

Imported where Triton is installed only. Launched without fused multiply-adds, which would round once where the
references round twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import TINY

_TINY = tl.constexpr(TINY)
# Number that rounds another below 2**22 to the nearest integer, ties to even, when added and subtracted again.
_TO_INTEGER = tl.constexpr(1.5 * 2**23)

# Programs that find an image's range together.
_MAX_RANGES = 256
# Values that a program processes at a time, to find a range and to round.
_RANGE_BLOCK, _BLOCK = 4096, 1024


@triton.jit
def _or_nan(value, x):
    """Return `value`, or NaN if any of `x` is, which Triton's reductions ignore."""
    return tl.where(tl.max((x != x).to(tl.int32), axis=0) > 0, float("nan"), value)


@triton.jit
def _tokens_kernel(x, codes, scale, columns, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    values = tl.load(x + token * columns + column, mask=column < columns, other=0.0).to(tl.float32)
    span = _or_nan(tl.maximum(tl.max(tl.abs(values), axis=0), _TINY), values)
    rounded = (values * tl.div_rn(127.0, span) + _TO_INTEGER) - _TO_INTEGER
    rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0)
    tl.store(codes + token * columns + column, rounded.to(tl.int8), mask=column < columns)
    tl.store(scale + token, tl.div_rn(span, 127.0))


def quantize_tokens_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize as `activations.quantize_tokens_reference` a contiguous `x` of fp32, bf16 or fp16."""
    tokens, columns = x.shape
    codes = torch.empty(tokens, columns, dtype=torch.int8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    warps = min(16, max(1, block // 512))
    if tokens:
        with torch.cuda.device_of(x):  # Triton launches on the current device.
            _tokens_kernel[(tokens,)](x, codes, scale, columns, BLOCK=block, num_warps=warps, enable_fp_fusion=False)
    return codes, scale


@triton.jit
def _range_kernel(x, bounds, values, span, BLOCK: tl.constexpr):
    """Store the smallest and largest of zero and the `span` values that begin at program_id * span."""
    first = tl.program_id(0).to(tl.int64) * span
    low = tl.zeros((BLOCK,), dtype=tl.float32)
    high = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, span, BLOCK):
        place = start + tl.arange(0, BLOCK)
        part = tl.load(x + first + place, mask=(place < span) & (first + place < values), other=0.0).to(tl.float32)
        low = tl.minimum(low, part, propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, part, propagate_nan=tl.PropagateNan.ALL)
    tl.store(bounds + tl.program_id(0), _or_nan(tl.min(low, axis=0), low))
    tl.store(bounds + tl.num_programs(0) + tl.program_id(0), _or_nan(tl.max(high, axis=0), high))


@triton.jit
def _image_kernel(
    x,
    codes,
    bounds,
    scale,
    zero_point,
    height,
    row_values,
    padding_h,
    padding_values,
    RANGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize a block of one padded row, of `row_values` in the image and `padding_values` on either side."""
    part = tl.arange(0, RANGES)
    lows, highs = tl.load(bounds + part), tl.load(bounds + RANGES + part)
    low, high = _or_nan(tl.min(lows, axis=0), lows), _or_nan(tl.max(highs, axis=0), highs)
    span = tl.maximum(high - low, _TINY, propagate_nan=tl.PropagateNan.ALL)
    inverse = tl.div_rn(255.0, span)
    zero = (-low * inverse + _TO_INTEGER) - _TO_INTEGER

    row = tl.program_id(0)
    padded_height = height + 2 * padding_h
    padded_values = row_values + 2 * padding_values
    image = (row // padded_height).to(tl.int64)
    y = row % padded_height - padding_h
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = place - padding_values
    inside = (source >= 0) & (source < tl.where((y >= 0) & (y < height), row_values, 0))
    values = tl.load(x + (image * height + y) * row_values + source, mask=inside, other=0.0).to(tl.float32)
    rounded = (values * inverse + _TO_INTEGER) - _TO_INTEGER + zero
    rounded = tl.minimum(tl.maximum(rounded, 0.0), 255.0) - 128.0
    tl.store(codes + row.to(tl.int64) * padded_values + place, rounded.to(tl.int8), mask=place < padded_values)
    if (row == 0) & (tl.program_id(1) == 0):
        tl.store(scale, tl.div_rn(span, 255.0))
        tl.store(zero_point, zero.to(tl.int32))


def quantize_image_triton(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize as `activations.quantize_image_reference` with padding, to signed codes of eight bits.

    Args:
        x: fp32, bf16 or fp16 [batch, in, height, width], channels last, at least one value.
        padding: zeros on both sides of the height and of the width.

    Returns:
        codes int8 [batch, in, padded height, padded width], channels last, less 128; scale fp32 [1]; zero_point
        int32 [1], from which 128 is not taken.
    """
    batch, channels, height, width = x.shape
    shape = batch, channels, height + 2 * padding[0], width + 2 * padding[1]
    codes = torch.empty(shape, dtype=torch.int8, device=x.device, memory_format=torch.channels_last)
    ranges = min(_MAX_RANGES, triton.next_power_of_2(triton.cdiv(x.numel(), _RANGE_BLOCK)))
    bounds = torch.empty(2, ranges, dtype=torch.float32, device=x.device)
    scale = torch.empty(1, dtype=torch.float32, device=x.device)
    zero_point = torch.empty(1, dtype=torch.int32, device=x.device)
    span = triton.cdiv(x.numel(), ranges * _RANGE_BLOCK) * _RANGE_BLOCK
    grid = batch * shape[2], triton.cdiv(shape[3] * channels, _BLOCK)
    with torch.cuda.device_of(x):  # Triton launches on the current device.
        _range_kernel[(ranges,)](x, bounds, x.numel(), span, BLOCK=_RANGE_BLOCK, num_warps=8)
        _image_kernel[grid](
            x,
            codes,
            bounds,
            scale,
            zero_point,
            height,
            width * channels,
            padding[0],
            padding[1] * channels,
            RANGES=ranges,
            BLOCK=_BLOCK,
            enable_fp_fusion=False,
        )
    return codes, scale, zero_point
