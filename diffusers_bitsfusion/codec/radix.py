"""Codes to bytes and back: base-L digits, in the file's form and in memory's.

A row (one output channel) of C codes k is written as digits k + h, where h is the largest code and L = 2h + 1 the
number of levels. Digits are *planar*: with W words a row, digit j of word i belongs to column j*W + i, so that
decoding is arithmetic on whole vectors. Columns past C hold the digit of zero.

- **byte form** (the file, docs/FORMAT.md): 5, 3, 2 digits a byte at 1, 2, 3 bits, one a byte above.
- **dense form** (memory): the byte form at 1 bit and above 4 bits; at 2 bits the 7-bit words of the byte form eight
  to seven bytes; at 3 bits five digits to two bytes; at 4 bits two digits to nine bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..native.dense_form import DENSE_FORMS
from .grid import half_range, levels

_DIGITS_PER_BYTE = {1: 5, 2: 3, 3: 2}


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def digits_per_word(bits: int) -> int:
    """Digits that a word of the dense form holds."""
    return DENSE_FORMS[bits].digits


def byte_width(columns: int, bits: int) -> int:
    """Bytes a row of `columns` codes takes in the byte form."""
    return _ceil_div(columns, _DIGITS_PER_BYTE.get(bits, 1))


def dense_width(columns: int, bits: int) -> int:
    """Bytes a row of `columns` codes takes in the dense form."""
    return DENSE_FORMS[bits].row_bytes(columns)


def _to_words(codes: Tensor, bits: int, per_word: int, dtype: torch.dtype) -> Tensor:
    """Join `per_word` planar digits of each row; codes int8 [R, C] to words [R, ceil(C / per_word)] of `dtype`."""
    rows, columns = codes.shape
    half, base = half_range(bits), levels(bits)
    width = _ceil_div(columns, per_word)
    digits = torch.full((rows, per_word * width), half, dtype=dtype, device=codes.device)
    digits[:, :columns].add_(codes)
    planes = digits.view(rows, per_word, width)
    words = planes[:, per_word - 1].clone()
    for j in range(per_word - 2, -1, -1):
        words.mul_(base).add_(planes[:, j])
    return words


def _from_words(words: Tensor, bits: int, per_word: int, columns: int) -> Tensor:
    """Inverse of `_to_words`; int8 [R, columns]."""
    digits = _split_digits(words.to(torch.float32), levels(bits), per_word)
    return torch.cat([digit.sub_(half_range(bits)).to(torch.int8) for digit in digits], dim=1)[:, :columns]


def _split_digits(words: Tensor, base: int, per_word: int) -> Iterator[Tensor]:
    """The `per_word` digits of fp32 `words`, lowest first, each of the words' shape; overwrites `words`."""
    for _ in range(per_word - 1):
        quotient = divide(words, base)
        yield words.sub_(quotient, alpha=base)
        words = quotient
    yield words


def divide(words: Tensor, base: int) -> Tensor:
    """Floor division of whole fp32 `words` below 2**16 by an odd `base` below 2**9, exactly.

    The half keeps every quotient at least 1 / (2 * base) away from an integer, far above fp32's rounding. In fp32 each
    step is one vector instruction, which makes this several times as fast as integers, whose division is not.
    """
    return (words + 0.5).mul_(1.0 / base).floor_()


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Byte form of codes.

    Args:
        codes: int8 [rows, columns].
        bits: 1 to 8.

    Returns:
        uint8 [rows, byte_width(columns, bits)].
    """
    return _to_words(codes, bits, _DIGITS_PER_BYTE.get(bits, 1), torch.uint8)


def unpack_bytes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_bytes`: int8 [rows, columns]."""
    return _from_words(packed, bits, _DIGITS_PER_BYTE.get(bits, 1), columns)


def largest_byte(bits: int) -> int:
    """The largest value a byte of the byte form can have; a larger one means a damaged file."""
    return levels(bits) ** _DIGITS_PER_BYTE.get(bits, 1) - 1


def pack_dense(codes: Tensor, bits: int) -> Tensor:
    """Dense form of codes: int8 [rows, columns] to uint8 [rows, dense_width(columns, bits)]."""
    form = DENSE_FORMS[bits]
    words = _to_words(codes, bits, form.digits, torch.int32 if form.word_bits > 8 else torch.uint8)
    if form.word_bits == 16:
        return torch.cat([words & 255, words >> 8], dim=1).to(torch.uint8)
    if form.word_bits == 9:
        return torch.cat([(words & 255).to(torch.uint8), _pack_bit_plane(words >> 8)], dim=1)
    return _pack_sevens(words) if form.word_bits == 7 else words


def unpack_dense(dense: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_dense`: int8 [rows, columns]."""
    codes = torch.empty(dense.shape[0], columns, dtype=torch.int8, device=dense.device)
    for start, plane in code_planes(dense, bits, columns):
        codes[:, start : start + plane.shape[1]] = plane
    return codes


def dense_from_bytes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Byte form to dense form, both uint8 with a row per output channel."""
    if not _same_words(bits):
        return pack_dense(unpack_bytes(packed, bits, columns), bits)
    return _pack_sevens(packed) if DENSE_FORMS[bits].word_bits == 7 else packed


def bytes_from_dense(dense: Tensor, bits: int, columns: int) -> Tensor:
    """Dense form to byte form, both uint8 with a row per output channel."""
    if not _same_words(bits):
        return pack_bytes(unpack_dense(dense, bits, columns), bits)
    if DENSE_FORMS[bits].word_bits == 7:
        return _seven_bit_groups(dense).flatten(1)[:, : byte_width(columns, bits)].contiguous()
    return dense


def _same_words(bits: int) -> bool:
    """Whether both forms join as many digits to a word."""
    return DENSE_FORMS[bits].digits == _DIGITS_PER_BYTE.get(bits, 1)


def code_planes(dense: Tensor, bits: int, columns: int) -> Iterator[tuple[int, Tensor]]:
    """Decode dense rows plane by plane.

    Yields:
        (first column, fp32 codes [rows, width]) with the planes covering columns 0 to `columns` once; the caller may
        change each.
    """
    words = _dense_words(dense, bits, columns)
    for j, digits in enumerate(_split_digits(words, levels(bits), digits_per_word(bits))):
        start = j * words.shape[1]
        if start < columns:
            yield start, digits[:, : columns - start].sub_(half_range(bits))


def _dense_words(dense: Tensor, bits: int, columns: int) -> Tensor:
    """fp32 words [R, W] of the dense form."""
    form = DENSE_FORMS[bits]
    words = form.words(columns)
    if form.word_bits == 7:
        return _seven_bit_groups(dense).flatten(1)[:, :words].to(torch.float32)
    low = dense[:, :words].to(torch.float32)
    if form.word_bits == 16:
        return low.add_(dense[:, words:], alpha=256)
    if form.word_bits == 9:
        return low.add_(_unpack_bit_plane(dense[:, words:], words), alpha=256)
    return low


def _pack_sevens(words: Tensor) -> Tensor:
    """uint8 words [R, W] below 128 to [R, 7 * ceil(W / 8)]: eight groups, of which the last one fills the top bits."""
    groups = _pad_columns(words, 8)
    low, last = groups[:, :-1], groups[:, -1:]
    bit = torch.arange(7, dtype=torch.uint8, device=words.device).view(1, 7, 1)
    return (low | (((last >> bit) & 1) << 7)).flatten(1)


def _seven_bit_groups(dense: Tensor) -> Tensor:
    """uint8 [R, 7V] to the eight groups of 7 bits, uint8 [R, 8, V]; group 7 is spread over the top bits."""
    rows = dense.view(dense.shape[0], 7, -1)
    last = rows[:, 0] >> 7
    for i in range(1, 7):
        last = last | ((rows[:, i] >> 7) << i)
    return torch.cat([rows & 127, last.unsqueeze(1)], dim=1)


def _pad_columns(packed: Tensor, parts: int) -> Tensor:
    """[R, W] to [R, parts, ceil(W / parts)], padded with zeros."""
    width = _ceil_div(packed.shape[1], parts)
    padded = torch.nn.functional.pad(packed, (0, parts * width - packed.shape[1]))
    return padded.view(packed.shape[0], parts, width)


def _pack_bit_plane(bits: Tensor) -> Tensor:
    """0/1 values [R, W] to uint8 [R, ceil(W / 8)]: bit p of byte v is value p*V + v."""
    parts = _pad_columns(bits.to(torch.uint8), 8)
    packed = parts[:, 0].clone()
    for p in range(1, 8):
        packed |= parts[:, p] << p
    return packed


def _unpack_bit_plane(packed: Tensor, words: int) -> Tensor:
    return torch.cat([(packed >> p) & 1 for p in range(8)], dim=1)[:, :words]
