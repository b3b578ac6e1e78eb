"""Integer products in Triton, for GPUs: a GEMM, and the convolution as an implicit one, which torch lacks there.

Imported where Triton is installed only. Scales and bias are applied before the sums leave the registers. Loads have no
masks but for the last channels: rows and columns beyond the output repeat others, and are not stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import FEW_TOKENS

# Rows and columns of the output that a program may compute; tensor cores of Hopper need 64 rows. The largest tile is
# for whole blocks on Hopper: elsewhere it spills registers.
_TILES = ((128, 128), (128, 64), (64, 128), (64, 64))
_TILE_OF_HOPPER, _HOPPER = (128, 256), 9
_TILE_OF_FEW_ROWS = (FEW_TOKENS, 64)
# Inputs of a block and stages of the pipeline: four stages of the largest tile are 96 KB of shared memory, which GPUs
# of all sizes have.
_BLOCK_K, _STAGES = 64, 4

# Weights that are added up at a time.
_SUMMED = 4096


def _tile(rows: int, columns: int, groups: int, whole: bool, device: torch.device) -> tuple[int, int]:
    """Return the tile by which the busiest multiprocessor loads the fewest operands, which bound int8 products."""
    if rows <= FEW_TOKENS:
        return _TILE_OF_FEW_ROWS
    tiles: tuple[tuple[int, int], ...] = _TILES
    processors = 1  # the interpreter's
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        processors = gpu.multi_processor_count
        if whole and gpu.major == _HOPPER:
            tiles = (_TILE_OF_HOPPER, *tiles)

    def loaded(tile: tuple[int, int]) -> int:
        programs = triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1]) * groups
        waves: int = triton.cdiv(programs, processors)
        return waves * sum(tile)

    return min(tiles, key=loaded)


def _warps(tile: tuple[int, int]) -> int:
    return 8 if tile[0] * tile[1] > 64 * 64 else 4


@triton.jit
def _load_operands(a_place, b_place, k, left, WHOLE: tl.constexpr):
    """Load blocks [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N]; zeros from k = left on, unless WHOLE."""
    if WHOLE:
        return tl.load(a_place), tl.load(b_place)
    else:
        a = tl.load(a_place, mask=k[None, :] < left, other=0)
        b = tl.load(b_place, mask=k[:, None] < left, other=0)
        return a, b


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
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute out[m, n] = token_scale[m] * weight_scale[n] * sum_k x[m, k] weight[n, k] + bias[n].

    The inputs are whole blocks if WHOLE.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_place = x + (row % tokens)[:, None].to(tl.int64) * inputs + k[None, :]
    b_place = weight + (column % outputs)[None, :].to(tl.int64) * inputs + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, inputs, BLOCK_K):
        a, b = _load_operands(a_place + start, b_place + start, k, inputs - start, WHOLE)
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
    """Return the product of codes, scaled.

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
    whole = inputs % _BLOCK_K == 0
    block_m, block_n = tile = _tile(rows, outputs, 1, whole, tokens.device)
    with torch.cuda.device_of(tokens):  # Triton launches on the current device
        _linear_kernel[(triton.cdiv(rows, block_m), triton.cdiv(outputs, block_n))](
            tokens,
            weight,
            out,
            token_scale,
            weight_scale,
            weight_scale if bias is None else bias.contiguous(),
            rows,
            outputs,
            inputs,
            HAS_BIAS=bias is not None,
            WHOLE=whole,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=_BLOCK_K,
            num_warps=_warps(tile),
            num_stages=_STAGES,
        )
    return out


@triton.jit
def _row_sums_kernel(weight, sums, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    weight += row.to(tl.int64) * columns
    parts = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, columns, BLOCK):
        place = start + tl.arange(0, BLOCK)
        parts += tl.load(weight + place, mask=place < columns, other=0).to(tl.int32)
    tl.store(sums + row, tl.sum(parts, axis=0))


@triton.jit
def _conv_kernel(
    x,
    weight,
    out,
    image_scale,
    zero_point,
    weight_scale,
    weight_sums,
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
    dilation_h,
    dilation_w,
    groups,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute a block of pixels of the output by a block of one group's `outputs`.

    Sums run over kernel positions and the group's `channels`, which are whole blocks if WHOLE. `height` and `width`
    include the padding.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(2)
    first = group * outputs
    pixel = row % rows
    top = pixel // out_width % out_height * stride_h
    left = pixel % out_width * stride_w
    pixel = ((pixel // (out_height * out_width)).to(tl.int64) * height + top) * width + left
    c = tl.arange(0, BLOCK_K)
    a_place = x + pixel[:, None] * (groups * channels) + group * channels + c[None, :]
    b_place = weight + (first + column % outputs)[None, :].to(tl.int64) * (positions * channels) + c[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    # One loop over positions and channels, which the compiler pipelines as a whole; places are counted on, since to
    # divide for them takes as long as a product.
    across = dilation_w * groups * channels  # to the next position
    down = (dilation_h * width - (kernel_width - 1) * dilation_w) * groups * channels  # to the first of the next row
    start, position_in_row, a_step, b_step = 0, 0, 0, 0
    for _ in range(positions * tl.cdiv(channels, BLOCK_K)):
        a, b = _load_operands(a_place + a_step, b_place + b_step, c, channels - start, WHOLE)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        last = start + BLOCK_K >= channels
        position_in_row += last.to(tl.int32)
        turn = position_in_row == kernel_width
        a_step += tl.where(last, tl.where(turn, down, across) - start, BLOCK_K)
        b_step += tl.where(last, channels - start, BLOCK_K)
        start = tl.where(last, 0, start + BLOCK_K)
        position_in_row = tl.where(turn, 0, position_in_row)
    zero = tl.load(zero_point) - 128
    sums -= zero * tl.load(weight_sums + first + column, mask=column < outputs, other=0)[None, :]
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
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the convolution of codes, scaled.

    Args:
        image: int8 [batch, in, height, width], channels last, codes less 128, with the padding.
        image_scale: fp32 [1].
        zero_point: int32 [1], 0 to 255, from which 128 is not yet taken.
        weight: int8 [out, kernel height * kernel width, in / groups], contiguous.
        weight_scale: fp32 [out].
        bias: floating [out].
        kernel: its height and width.
        stride: of the height and the width.
        dilation: of the height and the width.
        groups: number of groups of channels.
        dtype: of the output.

    Returns:
        [batch, out, height, width], channels last.

    Raises:
        RuntimeError: the kernel is larger than the image.
    """
    batch, _, height, width = image.shape
    outputs, positions, channels = weight.shape
    out_height, out_width = (
        (size - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i, size in enumerate((height, width))
    )
    if min(out_height, out_width) < 1:
        raise RuntimeError(
            f"Calculated padded input size per channel: ({height} x {width}). Kernel size: "
            f"({kernel[0]} x {kernel[1]}). Kernel size can't be greater than actual input size"
        )
    out = torch.empty(
        (batch, outputs, out_height, out_width),
        dtype=dtype,
        device=image.device,
        memory_format=torch.channels_last,
    )
    rows = batch * out_height * out_width
    whole = channels % _BLOCK_K == 0
    block_m, block_n = tile = _tile(rows, outputs // groups, groups, whole, image.device)
    weight_sums = torch.empty(outputs, dtype=torch.int32, device=image.device)
    with torch.cuda.device_of(image):  # Triton launches on the current device
        _row_sums_kernel[(outputs,)](weight, weight_sums, positions * channels, BLOCK=_SUMMED)
        _conv_kernel[(triton.cdiv(rows, block_m), triton.cdiv(outputs // groups, block_n), groups)](
            image,
            weight,
            out,
            image_scale,
            zero_point,
            weight_scale,
            weight_sums,
            weight_scale if bias is None else bias.contiguous(),
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
            *dilation,
            groups,
            HAS_BIAS=bias is not None,
            WHOLE=whole,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=_BLOCK_K,
            num_warps=_warps(tile),
            num_stages=_STAGES,
        )
    return out
