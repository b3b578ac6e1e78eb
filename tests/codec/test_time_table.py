import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_bitsfusion.codec.entropy import compress
from diffusers_bitsfusion.codec.time_table import (
    decode_table,
    encode_table,
    pack_table,
    packed_rows,
    quantize_table,
    unpack_rows,
)


def smooth_features(timesteps, features, seed=0):
    generator = np.random.default_rng(seed)
    t = np.linspace(0, 1, timesteps)[:, None]
    waves = [np.sin(f * t + generator.uniform(0, 6, features)) * generator.normal(size=features) for f in (3, 11, 40)]
    return torch.from_numpy(sum(waves).astype(np.float32))


def read_table(frame, timesteps, features):
    """The documented layout in plain numpy: low bytes then high bytes of zigzag third differences along time."""
    raw = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame.numpy().tobytes()), np.uint8)
    low, high = raw.reshape(2, timesteps, features).astype(np.int64)
    zigzag = low + 256 * high
    values = np.where(zigzag % 2 == 0, zigzag // 2, -(zigzag // 2) - 1)
    for _ in range(3):
        values = np.cumsum(values, axis=0)
    return values


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_any_codes_come_back(timesteps, features, seed):
    generator = np.random.default_rng(seed)
    codes = torch.from_numpy(generator.integers(-2000, 2001, (timesteps, features), dtype=np.int16))
    assert torch.equal(decode_table(encode_table(codes), timesteps, features), codes)


@pytest.mark.parametrize("features", [1, 1023, 1024, 1025, 2100])
def test_the_frame_is_the_documented_layout(features):
    codes, _ = quantize_table(smooth_features(40, features))
    frame = encode_table(codes)
    assert np.array_equal(read_table(frame, 40, features), codes.numpy())
    assert torch.equal(decode_table(frame, 40, features), codes)


def test_codes_as_large_as_a_table_can_hold_come_back():
    # One feature that is zero but for single steps has the largest code there is, and third differences of eight
    # times that.
    features = torch.zeros(1002, 3)
    features[500], features[501, 1] = 1.0, -1.0
    codes, _ = quantize_table(features)
    assert codes.abs().max() > 1000
    assert torch.equal(decode_table(encode_table(codes), 1002, 3), codes)


def test_the_error_is_below_half_a_percent_of_each_feature():
    features = smooth_features(1002, 60) * torch.logspace(-4, 4, 60)
    codes, scale = quantize_table(features)
    error = (codes * scale - features).square().mean(0).sqrt() / features.square().mean(0).sqrt()
    assert codes.dtype == torch.int16
    assert (error < 0.005).all()


def test_a_feature_that_is_always_zero_stays_zero():
    features = smooth_features(20, 4)
    features[:, 2] = 0
    codes, scale = quantize_table(features)
    assert not codes[:, 2].any()
    assert torch.isfinite(scale).all() and (scale > 0).all()


def test_smooth_features_take_far_less_than_their_codes():
    codes, _ = quantize_table(smooth_features(1002, 200))
    assert len(encode_table(codes)) < codes.numel() * 2 / 4


def test_a_damaged_table_is_refused():
    frame = encode_table(quantize_table(smooth_features(50, 20))[0])
    with pytest.raises(ValueError, match="damaged or cut short"):
        decode_table(frame[:-20], 50, 20)


@pytest.mark.parametrize(("timesteps", "features"), [(50, 21), (49, 20), (1, 1)])
def test_a_table_of_another_size_is_refused(timesteps, features):
    frame = encode_table(quantize_table(smooth_features(50, 20))[0])
    with pytest.raises(ValueError, match=f"holds 2000 bytes where {2 * timesteps * features} are expected"):
        decode_table(frame, timesteps, features)


def test_a_table_of_arbitrary_bytes_does_not_raise_or_overrun():
    noise = np.random.default_rng(0).integers(0, 256, 2 * 50 * 20, dtype=np.uint8)
    decoded = decode_table(compress(torch.from_numpy(noise)), 50, 20)
    assert decoded.shape == (50, 20) and decoded.dtype == torch.int16


def packed_and_back(codes):
    packed = pack_table(codes)
    return packed, unpack_rows(packed, torch.arange(len(codes)))


def smooth_codes(timesteps, features):
    return quantize_table(smooth_features(timesteps, features))[0]


def read_packed(packed, timesteps):
    """The layout in memory in plain integers: 10, 8 and 6 bits of three codes."""
    groups = packed.numpy().astype(int).reshape(-1, 3, packed.shape[1])
    anchors = groups[:, 0] + 256 * (groups[:, 2] % 4)
    anchors -= 1024 * (anchors >= 512)
    codes = []
    for i, (_, second, third) in enumerate(groups):
        codes.append(anchors[i])
        slope = (anchors[min(i + 1, len(anchors) - 1)] - anchors[i]) // 3
        for bits, values in ((second, 256), (third // 4, 64)):
            expected = codes[-1] + slope
            codes.append(expected + (bits - expected + values // 2) % values - values // 2)
    return np.stack(codes)[:timesteps]


@pytest.mark.parametrize("timesteps", [1, 2, 3, 4, 5, 12, 13, 14, 1002])
def test_smooth_codes_are_packed_in_eight_bits_and_come_back(timesteps):
    codes = smooth_codes(1002, 2100)[:timesteps]
    packed, found = packed_and_back(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_rows(timesteps), 2100)
    assert torch.equal(found, codes.int())
    assert np.array_equal(read_packed(packed, timesteps), codes.numpy())
    assert packed_rows(1002) == 1005


def test_codes_as_lively_as_a_time_embedding_are_packed():
    """Those of the fastest function that diffusers gives a time embedding, a cosine of the timestep itself."""
    t = torch.arange(-1, 1001).float()[:, None]
    codes, _ = quantize_table(torch.cos(t + torch.linspace(0, 6, 50)) + 2 * torch.cos(t / 9 + torch.arange(50)))
    packed, found = packed_and_back(codes)
    assert packed.dtype == torch.uint8 and torch.equal(found, codes.int())


@given(st.integers(1, 40), st.integers(1, 30), st.sampled_from([100, 300, 511, 2000]), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_any_codes_come_back_from_memory(timesteps, features, largest, seed):
    generator = np.random.default_rng(seed)
    codes = torch.from_numpy(generator.integers(-largest, largest + 1, (timesteps, features), dtype=np.int16))
    kept, found = packed_and_back(codes)
    assert torch.equal(found, codes.int())
    assert kept.dtype == torch.int16 or codes.abs().max() < 512


def test_rows_are_read_in_any_order_and_shape():
    codes = smooth_codes(50, 7)
    rows = torch.tensor([[49, 0], [13, 13]])
    assert torch.equal(unpack_rows(pack_table(codes), rows), codes[rows].int())
