"""Integer convolutions in Triton, as implicit products, for GPUs. Imported where Triton is installed only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int8_product import BLOCK_K, STAGES, load_operands, store_scaled, tile_of, warps

# Weights that are added up at a time.
_SUMMED = 4096


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
    # divide for them takes as long as a product. `across` leads to the next position, `down` to the next row's first.
    across = dilation_w * groups * channels
    down = (dilation_h * width - (kernel_width - 1) * dilation_w) * groups * channels
    start, position_in_row, a_step, b_step = 0, 0, 0, 0
    for _ in range(positions * tl.cdiv(channels, BLOCK_K)):
        a, b = load_operands(a_place + a_step, b_place + b_step, c, channels - start, WHOLE)
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
    store_scaled(
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
    whole = channels % BLOCK_K == 0
    block_m, block_n = tile = tile_of(rows, outputs // groups, groups, whole, image.device)
    weight_sums = torch.empty(outputs, dtype=torch.int32, device=image.device)
    with torch.cuda.device_of(image):  # Triton launches on the current device.
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
            BLOCK_K=BLOCK_K,
            num_warps=warps(tile),
            num_stages=STAGES,
        )
    return out
