"""Decoding in Triton, for GPUs. Imported where Triton is installed only; same results as `decode.decode_reference`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codec.grid import half_range, levels
from ..codec.radix import digits_per_word

_BLOCK = 512  # words that a program decodes


@triton.jit
def _load_words(row, index, mask, width, BITS: tl.constexpr):
    """int32 words of a row of the dense form (docs/ARCHITECTURE.md), which has `width` of them."""
    if BITS == 2:
        part = (width + 7) // 8
        group = index // part
        place = index % part
        words = tl.load(row + index, mask=mask & (group < 7), other=0).to(tl.int32) & 127
        for bit in tl.static_range(7):
            byte = tl.load(row + bit * part + place, mask=mask & (group == 7), other=0).to(tl.int32)
            words = words | ((byte >> 7) << bit)
        return words
    words = tl.load(row + index, mask=mask, other=0).to(tl.int32)
    if BITS == 3:
        words = words | (tl.load(row + width + index, mask=mask, other=0).to(tl.int32) << 8)
    if BITS == 4:
        part = (width + 7) // 8
        plane = tl.load(row + width + index % part, mask=mask, other=0).to(tl.int32)
        words = words | (((plane >> (index // part)) & 1) << 8)
    return words


@triton.jit
def _decode_kernel(
    dense,
    scale,
    out,
    columns,
    width,
    row_bytes,
    BITS: tl.constexpr,
    BASE: tl.constexpr,
    HALF: tl.constexpr,
    PLANES: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's block of words to planar columns; codes alone if CODES, else times the row's scale."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = _load_words(dense + row * row_bytes, index, index < width, width, BITS)
    factor = tl.load(scale + row)
    for plane in tl.static_range(PLANES):
        digit = words
        if plane < PLANES - 1:
            words = words // BASE  # of a constant: the compiler multiplies and shifts
            digit = digit - words * BASE
        column = plane * width + index
        value = digit - HALF
        if not CODES:
            value = value.to(tl.float32) * factor
        inside = (index < width) & (column < columns)
        tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)


def decode_triton(codes: Tensor, scale: Tensor, bits: int, columns: int, out: Tensor) -> Tensor:
    """`decode.decode_reference` for contiguous tensors; `out` fp32, bf16, fp16 or int8."""
    per_word = digits_per_word(bits)
    width = -(-columns // per_word)
    with torch.cuda.device_of(codes):  # Triton launches on the current device
        _decode_kernel[(codes.shape[0], triton.cdiv(width, _BLOCK))](
            codes,
            scale,
            out,
            columns,
            width,
            codes.shape[1],
            BITS=bits,
            BASE=levels(bits),
            HALF=half_range(bits),
            PLANES=per_word,
            CODES=out.dtype == torch.int8,
            BLOCK=_BLOCK,
        )
    return out
