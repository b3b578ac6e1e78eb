import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_bitsfusion.codec.entropy import compress, decompress
from diffusers_bitsfusion.codec.radix import pack_bytes
from diffusers_bitsfusion.codec.scales import quantize_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def digits(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 5, count, dtype=np.uint8))


def tensor_of(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@given(st.binary(min_size=1, max_size=3000))
@settings(deadline=None)
def test_any_bytes_come_back(data):
    assert bytes(decompress(compress(tensor_of(data)), len(data)).numpy()) == data


@pytest.mark.parametrize("shape", [(7,), (3, 11), (2, 3, 5)])
def test_a_tensor_of_any_shape_becomes_one_frame_of_its_bytes_in_order(shape):
    data = digits(int(np.prod(shape))).view(shape)
    frame = compress(data)
    assert frame.dtype == torch.uint8 and frame.dim() == 1
    assert zstandard.ZstdDecompressor().decompress(frame.numpy().tobytes()) == data.numpy().tobytes()


def test_a_tensor_that_is_not_contiguous_is_written_in_its_own_order():
    data = digits(120).view(10, 12).T
    assert torch.equal(decompress(compress(data), 120).view(12, 10), data)


@pytest.mark.parametrize(("bits", "measured"), [(1, 1.5404), (2, 2.1936), (3, 2.9242), (4, 3.6953)])
def test_codes_of_gaussian_weights_take_little_more_than_their_entropy(bits, measured):
    codes, _ = quantize_rows(torch.randn(200, 3000, generator=torch.Generator().manual_seed(0)), bits)
    counts = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    taken = 8 * len(compress(pack_bytes(codes, bits))) / codes.numel()
    assert taken >= -(counts * np.log2(counts)).sum()
    assert taken == pytest.approx(measured, rel=0.005)


def test_what_comes_back_can_be_written():
    data = decompress(compress(digits(50)), 50)
    data[3] = 9
    assert data[3] == 9


@pytest.mark.parametrize("position", [0.2, 0.5, 0.9, 0.999])
def test_a_damaged_frame_is_refused(position):
    frame = compress(digits(20_000)).clone()
    frame[int(position * len(frame))] ^= 0x55
    with pytest.raises(ValueError, match="damaged"):
        decompress(frame, 20_000)


@pytest.mark.parametrize("kept", [0, 1, 3, 8, 0.5, 0.99])
def test_a_truncated_frame_is_refused(kept):
    frame = compress(digits(20_000))
    kept = kept if isinstance(kept, int) else int(kept * len(frame))
    with pytest.raises(ValueError, match="damaged or cut short"):
        decompress(frame[:kept], 20_000)


def test_a_frame_that_lost_its_last_byte_is_refused():
    frame = compress(digits(20_000))
    with pytest.raises(ValueError, match="cut short"):
        decompress(frame[:-1], 20_000)


def test_bytes_after_the_frame_are_refused():
    frame = torch.cat([compress(digits(300)), tensor_of(b"more")])
    with pytest.raises(ValueError, match=r"damaged|bytes"):
        decompress(frame, 300)


def test_what_is_no_frame_is_refused():
    with pytest.raises(ValueError, match="damaged"):
        decompress(tensor_of(b"not a zstd frame at all"), 23)


@pytest.mark.parametrize("expected", [1, 299, 301, 10_000])
def test_a_frame_of_another_size_is_refused_naming_both(expected):
    with pytest.raises(ValueError, match=f"holds 300 bytes where {expected} are expected"):
        decompress(compress(digits(300)), expected)


def frame_header_claiming(size):
    """A single-segment frame header with an 8-byte content size (RFC 8878, section 3.1.1.1)."""
    return b"\x28\xb5\x2f\xfd" + bytes([0b1110_0000]) + size.to_bytes(8, "little")


def test_a_frame_that_claims_terabytes_is_refused_before_any_memory_is_taken():
    bomb = frame_header_claiming(2**42) + b"\x01\x00\x00"
    with pytest.raises(ValueError, match=f"holds {2**42} bytes where 100 are expected"):
        decompress(tensor_of(bomb), 100)


def test_a_frame_that_holds_more_than_it_claims_is_refused():
    run_of_a_million = (1 | 1 << 1 | 100_000 << 3).to_bytes(3, "little") + b"\x07"
    bomb = frame_header_claiming(100) + run_of_a_million
    with pytest.raises(ValueError, match="damaged"):
        decompress(tensor_of(bomb), 100)


def test_a_frame_that_does_not_say_its_size_is_refused():
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))
    with pytest.raises(ValueError, match="where 100 are expected"):
        decompress(tensor_of(frame), 100)
