"""Integer products of activations and codes, against numpy's in 64 bits and torch's convolution in fp64."""

import platform

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_bitsfusion.codec.grid import code_range
from diffusers_bitsfusion.codec.radix import pack_dense
from diffusers_bitsfusion.native import library as native
from diffusers_bitsfusion.ops.dispatch import multiplies_blocks, why_no_int_mm
from diffusers_bitsfusion.ops.products import (
    Windows,
    block_codes,
    int_mm,
    int_mm_reference,
    multiply_blocks,
)

pytestmark = pytest.mark.usefixtures("one_thread")

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the loops are for AVX2")


def operands(tokens, rows, columns, bits, seed=0):
    rng = np.random.default_rng(seed)
    low, high = code_range(bits, balance=True)
    x = rng.integers(-128, 128, (tokens, columns), dtype=np.int8)
    return x, rng.integers(low, high + 1, (rows, columns), dtype=np.int8)


def multiply(x, weight, bits=None):
    """Sums of the plain reference; with `bits` those of the kernel that is chosen for it."""
    sums = torch.full((len(x) + 1, len(weight)), 7, dtype=torch.int32)
    tokens, codes = torch.from_numpy(x), torch.from_numpy(weight)
    if bits is None:
        found = int_mm_reference(tokens, codes, sums)
    else:
        in_blocks = multiplies_blocks(tokens.device, bits)
        found = int_mm(tokens, blocked(codes, bits) if in_blocks else codes, bits, sums)
    assert found.data_ptr() == sums.data_ptr() and torch.equal(sums[-1], torch.full_like(sums[-1], 7))
    return found.numpy()


def blocked(codes, bits, kept=False):
    dense = pack_dense(codes.flatten(1).contiguous(), bits)
    return block_codes(dense, torch.ones(len(codes)), bits, codes.shape, kept)


@pytest.fixture
def compiled_loops():
    if native.native_library() is None:
        pytest.skip("there is no C compiler")


@pytest.fixture
def without_vnni(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)


@given(
    tokens=st.integers(1, 40),
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    bits=st.integers(1, 7),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=150)
def test_every_shape_gives_numpys_sums(tokens, rows, columns, bits, seed):
    x, weight = operands(tokens, rows, columns, bits, seed)
    expected = x.astype(np.int64) @ weight.astype(np.int64).T
    assert np.array_equal(multiply(x, weight), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
        assert np.array_equal(multiply(x, weight, bits), expected)


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@x86
@given(
    batch=st.integers(1, 3),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 50),
    image=pairs(5, 12),
    kernel=pairs(1, 3),
    stride=pairs(1, 3),
    padding=pairs(0, 3),
    dilation=pairs(1, 2),
    bits=st.integers(1, 7),
    zero_point=st.integers(0, 255),
    threads=st.sampled_from([1, 2, 5]),
    data=st.data(),
)
@settings(deadline=None, max_examples=150)
def test_every_convolution_gives_torchs_sums_in_fp64(
    batch, inputs, outputs, image, kernel, stride, padding, dilation, bits, zero_point, threads, data
):
    generator = torch.Generator().manual_seed(0)
    low, high = code_range(bits, balance=True)
    codes = torch.randint(low, high + 1, (outputs, inputs, *kernel), dtype=torch.int8, generator=generator)
    x = torch.randint(0, 256, (batch, *image, inputs), dtype=torch.uint8, generator=generator)
    plain = (x.double() - zero_point).permute(0, 3, 1, 2)
    expected = F.conv2d(plain, codes.double(), None, stride, padding, dilation)
    windows = Windows(image, expected.shape[2:], kernel, stride, padding, dilation)
    expected = expected.permute(0, 2, 3, 1).reshape(-1, outputs)
    first = data.draw(st.integers(0, len(expected) - 1))
    count = data.draw(st.integers(1, len(expected) - first))
    sums = torch.full((count + 1, outputs), 7, dtype=torch.int32)
    torch.set_num_threads(threads)
    weight = blocked(codes, bits, kept=threads == 1)
    multiply_blocks(x, zero_point, weight, bits, windows, first, sums[:count])
    assert torch.equal(sums[:count].double(), expected[first : first + count])
    assert torch.equal(sums[count], torch.full_like(sums[count], 7))


@x86
def test_convolutions_of_many_panels_columns_and_threads():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-4, 5, (37, 190, 3, 3), dtype=torch.int8, generator=generator)  # 1,728 columns, 3 blocks
    x = torch.randint(0, 256, (2, 17, 19, 190), dtype=torch.uint8, generator=generator)  # 646 positions, 7 panels
    expected = F.conv2d((x.double() - 131).permute(0, 3, 1, 2), codes.double(), padding=1)
    for threads in (1, 2, 3, 12, 64):
        torch.set_num_threads(threads)
        sums = torch.empty(2 * 17 * 19, 37, dtype=torch.int32)
        windows = Windows((17, 19), (17, 19), (3, 3), padding=(1, 1))
        multiply_blocks(x, 131, blocked(codes, 3), 3, windows, 0, sums)
        assert torch.equal(sums.double(), expected.permute(0, 2, 3, 1).reshape(-1, 37))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (16, 4), (50, 39), (33, 1, 3, 3), (48, 70, 3, 3), (17, 18, 2, 1)])
def test_codes_in_blocks_are_those_of_a_plain_loop(shape, bits, compiled_loops):
    low, high = code_range(bits, balance=True)
    codes = torch.randint(low, high + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    found = blocked(codes, bits, kept=True)
    outputs, inputs = shape[:2]
    taps, blocks, fours = codes[0, 0].numel(), -(-outputs // 16), -(-inputs // 4)
    weight = found[: blocks * taps * fours * 64].view(blocks, taps, fours, 16, 4).permute(0, 3, 2, 4, 1)
    weight = weight.reshape(blocks * 16, fours * 4, taps)[:outputs, :inputs]
    assert torch.equal(weight, codes.view(outputs, inputs, taps))
    sums = found[blocks * taps * fours * 64 :].view(torch.int32)[:outputs]
    assert torch.equal(sums, -codes.flatten(1).sum(1, dtype=torch.int32))


@x86
@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("token", [-128, 127])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_products_do_not_overflow(bits, token, sign, without_vnni):
    columns = 5120 + 45
    x = np.full((5, columns), token, dtype=np.int8)
    weight = np.full((3, columns), sign * code_range(bits, balance=True)[1], dtype=np.int8)
    assert why_no_int_mm() is None
    assert np.array_equal(multiply(x, weight, bits), x.astype(np.int64) @ weight.astype(np.int64).T)


@x86
def test_tokens_of_many_panels_on_several_threads(without_vnni):
    x, weight = operands(1001, 130, 900, bits=3)
    torch.set_num_threads(2)
    assert np.array_equal(multiply(x, weight, 3), x.astype(np.int64) @ weight.astype(np.int64).T)


@x86
def test_a_processor_without_these_instructions_says_so(fresh_library, monkeypatch, without_vnni):
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-mno-avx2", "-mno-avx512f", "-O1"))
    assert native.native_library().multiply is None
    assert why_no_int_mm() == "this processor has neither VNNI nor AVX2"
    x, weight = operands(3, 4, 70, bits=2)
    assert np.array_equal(multiply(x, weight, 2), x.astype(np.int64) @ weight.astype(np.int64).T)
