"""Decoding in Triton, for GPUs. Imported where Triton is installed only; same results as `decode.decode_reference`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...codec.grid import half_range, levels
from ...native.dense_form import DENSE_FORMS

# Words, for each kernel position, and rows that a program decodes: 3 KB of fp16 weights and more.
_ROWS, _WORDS = 8, 64

# Bits of the fixed-point reciprocal: word * (2**_SHIFT // base + 1) >> _SHIFT is word / base, rounded down, for every
# word and base of the dense form, and fits 32 bits.
_SHIFT = 19


@triton.jit
def load_words(row, index, mask, last, width, WORD_BITS: tl.constexpr):
    """Return uint32 words of rows of the dense form (docs/ARCHITECTURE.md).

    A row has `width` words; `last` is the highest index that any of these words may have.
    """
    if WORD_BITS == 7:  # Words have seven bits each; their last eighth lies in the top bits of the others.
        part = (width + 7) // 8
        words = tl.load(row + index, mask=mask & (index < 7 * part), other=0).to(tl.uint32) & 127
        if last >= 7 * part:
            place = index - 7 * part
            for bit in range(7):
                byte = tl.load(row + bit * part + place, mask=mask & (place >= 0), other=0).to(tl.uint32)
                words = words | ((byte >> 7) << bit)
    else:
        words = tl.load(row + index, mask=mask, other=0).to(tl.uint32)
    if WORD_BITS == 16:
        words = words | (tl.load(row + width + index, mask=mask, other=0).to(tl.uint32) << 8)
    if WORD_BITS == 9:
        part = (width + 7) // 8
        plane = tl.load(row + width + index % part, mask=mask, other=0).to(tl.uint32)
        words = words | (((plane >> (index // part).to(tl.uint32)) & 1) << 8)
    return words


@triton.jit
def last_digit(words, BASE: tl.constexpr, RECIPROCAL: tl.constexpr, SHIFT: tl.constexpr):
    """Return (digit, what is left of the words), both uint32."""
    left = (words * RECIPROCAL) >> SHIFT
    return words - left * BASE, left


def _decode(
    dense,
    scale,
    out,
    rows,
    columns,
    width,
    row_bytes,
    WORD_BITS: tl.constexpr,
    BASE: tl.constexpr,
    HALF: tl.constexpr,
    PLANES: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    SHIFT: tl.constexpr,
    POSITIONS: tl.constexpr,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Decode words to planar columns, codes alone if CODES, else times their row's scale.

    Column c * POSITIONS + p of the codes is column p * (columns / POSITIONS) + c of the output.
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    first_word = tl.program_id(1) * WORDS * POSITIONS
    row = tl.arange(0, ROWS)[:, None]
    inside_row = first_row + row < rows
    dense += first_row * row_bytes
    out += first_row * columns
    factor = tl.load(scale + first_row + row, mask=inside_row, other=0.0)
    place = tl.arange(0, WORDS)[None, :]
    channels = columns // POSITIONS
    for position in range(POSITIONS):
        index = first_word + place * POSITIONS + position
        mask = inside_row & (index < width)
        words = load_words(
            dense + row * row_bytes, index, mask, first_word + (WORDS * POSITIONS - 1), width, WORD_BITS
        )
        for plane in tl.static_range(PLANES):
            digit, words = last_digit(words, BASE, RECIPROCAL, SHIFT)
            # It is the first of these columns; the next is POSITIONS further.
            first = first_word + plane * width + position
            column = first % POSITIONS * channels + first // POSITIONS + place
            value = digit.to(tl.int32) - HALF
            if not CODES:
                value = value.to(tl.float32) * factor
            inside = mask & (plane * width + index < columns)
            tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)


# Divisor of sizes that Triton's compiler treats as aligned. Where all sizes are, a thread stores several neighbours in
# one go; where only some are, it stores several one by one: so all sizes are declared as aligned, or none.
_ALIGNED = 16
_decode_aligned = triton.jit(_decode)
_decode_any = triton.jit(do_not_specialize=["columns", "width", "row_bytes"])(_decode)


def decode_triton(codes: Tensor, scale: Tensor, bits: int, columns: int, out: Tensor, positions: int = 1) -> Tensor:
    """Decode as `decode.decode_reference` for contiguous tensors; `out` fp32, bf16, fp16 or int8.

    With `positions`, the columns (channel, position) of the codes become columns (position, channel) of `out`.
    """
    width = DENSE_FORMS[bits].words(columns)
    grid = triton.cdiv(len(codes), _ROWS), triton.cdiv(width, _WORDS * positions)
    aligned = all(size % _ALIGNED == 0 for size in (columns, width, codes.shape[1]))
    kernel = _decode_aligned if aligned else _decode_any
    with torch.cuda.device_of(codes):  # Triton launches on the current device.
        kernel[grid](
            codes,
            scale,
            out,
            len(codes),
            columns,
            width,
            codes.shape[1],
            **dense_form(bits),
            POSITIONS=positions,
            CODES=out.dtype == torch.int8,
            ROWS=_ROWS,
            WORDS=_WORDS,
        )
    return out


def dense_form(bits: int) -> dict[str, int]:
    """Return the constants of the dense form that the kernels need."""
    base = levels(bits)
    return {
        "WORD_BITS": DENSE_FORMS[bits].word_bits,
        "BASE": base,
        "HALF": half_range(bits),
        "PLANES": DENSE_FORMS[bits].digits,
        "RECIPROCAL": (1 << _SHIFT) // base + 1,
        "SHIFT": _SHIFT,
    }
