"""The layout of FORMAT.md and of `codec.radix`, stated again digit by digit in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_bitsfusion.codec.radix import (
    byte_width,
    bytes_from_dense,
    code_planes,
    dense_from_bytes,
    dense_width,
    divide,
    largest_byte,
    pack_bytes,
    pack_dense,
    unpack_bytes,
    unpack_dense,
)
from diffusers_bitsfusion.codec.repack import repack

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = {1: 1, 2: 2, 3: 4, 4: 8, 5: 16, 6: 32, 7: 64, 8: 127}
DIGITS_IN_A_BYTE = {1: 5, 2: 3, 3: 2, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1}


@st.composite
def packed_cases(draw):
    bits = draw(st.integers(1, 8))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 200))
    seed = draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(-HALF[bits], HALF[bits] + 1, (rows, columns), dtype=np.int8)
    return codes, bits


def words_of(row, bits, digits):
    """Words of one row: digit j of word i is column j*W + i, missing columns hold the digit of zero."""
    width = -(-len(row) // digits)
    words = []
    for i in range(width):
        word = 0
        for j in range(digits):
            column = j * width + i
            code = int(row[column]) if column < len(row) else 0
            word += (code + HALF[bits]) * (2 * HALF[bits] + 1) ** j
        words.append(word)
    return words


def expected_bytes(row, bits):
    return words_of(row, bits, DIGITS_IN_A_BYTE[bits])


def expected_dense(row, bits):
    if bits == 2:
        words = words_of(row, bits, 3)
        part = -(-len(words) // 8)
        words += [0] * (8 * part - len(words))
        return [words[p * part + v] + 128 * (words[7 * part + v] >> p & 1) for p in range(7) for v in range(part)]
    if bits == 3:
        words = words_of(row, bits, 5)
        return [word % 256 for word in words] + [word // 256 for word in words]
    if bits == 4:
        words = words_of(row, bits, 2)
        part = -(-len(words) // 8)
        tops = [word // 256 for word in words] + [0] * (8 * part - len(words))
        return [word % 256 for word in words] + [sum(tops[p * part + v] << p for p in range(8)) for v in range(part)]
    return expected_bytes(row, bits)


@given(packed_cases())
@settings(deadline=None, max_examples=150)
def test_the_byte_form_is_the_documented_layout(case):
    codes, bits = case
    packed = pack_bytes(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [expected_bytes(row, bits) for row in codes]


@given(packed_cases())
@settings(deadline=None, max_examples=150)
def test_the_dense_form_is_the_documented_layout(case):
    codes, bits = case
    dense = pack_dense(torch.from_numpy(codes), bits)
    assert dense.dtype == torch.uint8
    assert dense.tolist() == [expected_dense(row, bits) for row in codes]


@given(packed_cases())
@settings(deadline=None, max_examples=150)
def test_codes_survive_every_way_through_the_two_forms(case):
    codes, bits = case
    original, columns = torch.from_numpy(codes), codes.shape[1]
    packed, dense = pack_bytes(original, bits), pack_dense(original, bits)
    assert torch.equal(unpack_bytes(packed, bits, columns), original)
    assert torch.equal(unpack_dense(dense, bits, columns), original)
    assert torch.equal(dense_from_bytes(packed, bits, columns), dense)
    assert torch.equal(repack(packed, bits, columns), dense)
    assert torch.equal(bytes_from_dense(dense, bits, columns), packed)


@given(st.integers(1, 5000), st.integers(1, 8))
@settings(deadline=None)
def test_the_widths_are_those_of_the_packed_tensors(columns, bits):
    codes = torch.zeros(1, columns, dtype=torch.int8)
    assert pack_bytes(codes, bits).shape == (1, byte_width(columns, bits))
    assert pack_dense(codes, bits).shape == (1, dense_width(columns, bits))


@given(packed_cases())
@settings(deadline=None)
def test_the_planes_cover_every_column_once(case):
    codes, bits = case
    seen = np.zeros(codes.shape[1], dtype=int)
    for start, plane in code_planes(pack_dense(torch.from_numpy(codes), bits), bits, codes.shape[1]):
        seen[start : start + plane.shape[1]] += 1
        assert plane.tolist() == codes[:, start : start + plane.shape[1]].tolist()
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("bits", "in_file", "in_memory"),
    [(1, 8 / 5, 8 / 5), (2, 8 / 3, 7 / 3), (3, 4, 16 / 5), (4, 8, 4.5), (5, 8, 8), (6, 8, 8), (7, 8, 8), (8, 8, 8)],
)
def test_a_weight_of_a_large_layer_has_the_documented_bits(bits, in_file, in_memory):
    columns = 2 * 3 * 5 * 8 * 56
    assert 8 * byte_width(columns, bits) / columns == pytest.approx(in_file)
    assert 8 * dense_width(columns, bits) / columns == pytest.approx(in_memory)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_largest_byte_is_that_of_the_largest_codes(bits):
    codes = torch.full((1, DIGITS_IN_A_BYTE[bits]), HALF[bits], dtype=torch.int8)
    assert pack_bytes(codes, bits).tolist() == [[largest_byte(bits)]]


def test_division_without_integers_is_exact_for_every_word_and_odd_base():
    words = np.arange(2**16, dtype=np.int32)
    for base in range(3, 512, 2):
        assert np.array_equal(divide(torch.from_numpy(words), base).numpy(), words // base), base


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_single_column_keeps_its_code(bits):
    codes = torch.arange(-HALF[bits], HALF[bits] + 1, dtype=torch.int8).unsqueeze(1)
    assert torch.equal(unpack_bytes(pack_bytes(codes, bits), bits, 1), codes)
    assert torch.equal(unpack_dense(pack_dense(codes, bits), bits, 1), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_leaves_the_codes_as_they_were(bits):
    codes = torch.full((2, 19), -HALF[bits], dtype=torch.int8)
    pack_bytes(codes, bits)
    pack_dense(codes, bits)
    assert (codes == -HALF[bits]).all()
