"""Tables of low rank: the error that they promise, what they take, and the documented layout."""

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_bitsfusion.codec.entropy import compress
from diffusers_bitsfusion.codec.low_rank_table import (
    decode_basis,
    decode_coefficients,
    encode_basis,
    encode_coefficients,
    factorize,
)
from diffusers_bitsfusion.codec.time_table import encode_table, quantize_table


def sums_of_waves(timesteps, columns, functions=10, seed=0):
    """Features that are sums of the same few waves, as those of a trained model are."""
    generator = np.random.default_rng(seed)
    t = np.linspace(0, 1, timesteps)[:, None]
    waves = np.sin(np.geomspace(2, 60, functions) * t + generator.uniform(0, 6, functions))
    return torch.from_numpy((waves @ generator.normal(size=(functions, columns))).astype(np.float32))


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_the_error_is_that_of_the_table_in_a_tenth_of_its_bytes():
    parts = [sums_of_waves(1002, 200), sums_of_waves(1002, 90, seed=1) * 50, sums_of_waves(1002, 100) * 1e-4]
    table = factorize(parts)
    dense = table.dense()
    assert dense.shape == (1002, 390)
    for found, part in zip(dense.split([200, 90, 100], dim=1), parts, strict=True):
        assert relative(found, part) < 0.006
    scaled = torch.cat([part / part.square().mean().sqrt() for part in parts], dim=1)
    assert relative(dense / table.scale, scaled) < 0.0045
    codes = torch.cat([quantize_table(part)[0] for part in parts], dim=1)
    assert table.file_bytes() < encode_table(codes).numel() / 10


def test_each_part_has_one_scale():
    table = factorize([sums_of_waves(60, 8), sums_of_waves(60, 5) * 3])
    first, second = table.scale.split([8, 5])
    assert len(first.unique()) == len(second.unique()) == 1 and second[0] > 2 * first[0]


def test_features_of_many_functions_have_no_table_of_low_rank():
    noise = torch.randn(1002, 600, generator=torch.Generator().manual_seed(0))
    assert factorize([noise]) is None


@pytest.mark.parametrize("part", [torch.zeros(1002, 300), torch.zeros(1002, 1)])
def test_features_that_are_always_zero_stay_zero(part):
    table = factorize([sums_of_waves(1002, 40), part])
    assert torch.equal(table.dense()[:, 40:], part)
    assert (table.scale > 0).all() and torch.isfinite(table.scale).all()


def test_a_model_of_zeros_has_no_table_of_low_rank():
    assert factorize([torch.zeros(1002, 30)]) is None


def test_a_code_beyond_16_bits_is_not_written():
    part = sums_of_waves(102, 3000)
    part[:, 0] *= 1e6
    table = factorize([part])
    assert table is None or relative(table.dense(), part) < 0.006


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_any_codes_come_back(timesteps, rank, seed):
    codes = np.random.default_rng(seed).integers(-32767, 32768, (timesteps, rank), dtype=np.int16)
    codes = torch.from_numpy(codes)
    assert torch.equal(decode_basis(encode_basis(codes), timesteps, rank), codes)
    assert torch.equal(decode_coefficients(encode_coefficients(codes), timesteps, rank), codes)


def test_the_frame_of_functions_is_the_documented_layout():
    basis = factorize([sums_of_waves(80, 30)]).basis
    raw = np.frombuffer(zstandard.ZstdDecompressor().decompress(encode_basis(basis).numpy().tobytes()), np.uint8)
    low, high = raw.reshape(2, basis.shape[1], 80).astype(np.int64)
    zigzag = low + 256 * high
    values = np.where(zigzag % 2 == 0, zigzag // 2, -(zigzag // 2) - 1)
    assert np.array_equal(np.cumsum(np.cumsum(values, axis=1), axis=1).T, basis.numpy())


@pytest.mark.parametrize("decode", [decode_basis, decode_coefficients])
def test_damaged_frames_and_those_of_another_size_are_refused(decode):
    frame = compress(torch.zeros(2 * 5 * 7, dtype=torch.uint8))
    assert not decode(frame, 5, 7).any()
    with pytest.raises(ValueError, match="holds 70 bytes where 84 are expected"):
        decode(frame, 6, 7)
    with pytest.raises(ValueError, match="damaged or cut short"):
        decode(frame[:-3], 5, 7)
