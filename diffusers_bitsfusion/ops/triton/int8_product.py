"""What the integer products in Triton share: their tiles, and how operands are loaded and sums stored.

Imported where Triton is installed only. Scales and bias are applied before the sums leave the registers. Loads have no
masks but for the last channels: rows and columns beyond the output repeat others, and are not stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..dispatch import FEW_TOKENS

# Rows and columns of the output that a program may compute; tensor cores of Hopper need 64 rows. The largest tile is
# for whole blocks on Hopper: elsewhere it spills registers.
_TILES = ((128, 128), (128, 64), (64, 128), (64, 64))
_TILE_OF_HOPPER, _HOPPER = (128, 256), 9
_TILE_OF_FEW_ROWS = (FEW_TOKENS, 64)
# Inputs of a block and stages of the pipeline: four stages of the largest tile are 96 KB of shared memory, which GPUs
# of all sizes have.
BLOCK_K, STAGES = 64, 4


def tile_of(rows: int, columns: int, groups: int, whole: bool, device: torch.device) -> tuple[int, int]:
    """Return the tile by which the busiest multiprocessor loads the fewest operands, which bound int8 products."""
    if rows <= FEW_TOKENS:
        return _TILE_OF_FEW_ROWS
    tiles: tuple[tuple[int, int], ...] = _TILES
    processors = 1  # This is the interpreter's.
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


def warps(tile: tuple[int, int]) -> int:
    """Return the number of warps that compute a tile."""
    return 8 if tile[0] * tile[1] > 64 * 64 else 4


@triton.jit
def load_operands(a_place, b_place, k, left, WHOLE: tl.constexpr):
    """Load blocks [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N]; zeros from k = left on, unless WHOLE."""
    if WHOLE:
        return tl.load(a_place), tl.load(b_place)
    else:
        a = tl.load(a_place, mask=k[None, :] < left, other=0)
        b = tl.load(b_place, mask=k[:, None] < left, other=0)
        return a, b


@triton.jit
def store_scaled(out, sums, row_scale, weight_scale, bias, row, column, rows, columns, stride, HAS_BIAS: tl.constexpr):
    """Store sums [BLOCK_M, BLOCK_N] times their scales, in fp32 and rounded once."""
    factors = tl.load(weight_scale + column, mask=column < columns, other=0.0)
    y = sums.to(tl.float32) * factors[None, :] * row_scale
    if HAS_BIAS:
        y += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    place = row[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
