"""Integer products of tokens and codes, against numpy's in 64 bits."""

import platform

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_bitsfusion.codec.grid import code_range
from diffusers_bitsfusion.native import library as native
from diffusers_bitsfusion.ops.dispatch import why_no_int_mm
from diffusers_bitsfusion.ops.products import int_mm, int_mm_reference

pytestmark = pytest.mark.usefixtures("one_thread")

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the loops are for AVX2")


def operands(tokens, rows, columns, bits, seed=0):
    rng = np.random.default_rng(seed)
    low, high = code_range(bits, balance=True)
    x = rng.integers(-128, 128, (tokens, columns), dtype=np.int8)
    return x, rng.integers(low, high + 1, (rows, columns), dtype=np.int8)


def multiply(kernel, x, weight, *bits):
    sums = torch.full((len(x) + 1, len(weight)), 7, dtype=torch.int32)
    found = kernel(torch.from_numpy(x), torch.from_numpy(weight), *bits, sums)
    assert found.data_ptr() == sums.data_ptr() and torch.equal(sums[-1], torch.full_like(sums[-1], 7))
    return found.numpy()


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
    assert np.array_equal(multiply(int_mm_reference, x, weight), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
        assert np.array_equal(multiply(int_mm, x, weight, bits), expected)


@x86
@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("token", [-128, 127])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_products_do_not_overflow(bits, token, sign, without_vnni):
    columns = 5120 + 45
    x = np.full((5, columns), token, dtype=np.int8)
    weight = np.full((3, columns), sign * code_range(bits, balance=True)[1], dtype=np.int8)
    assert why_no_int_mm() is None
    assert np.array_equal(multiply(int_mm, x, weight, bits), x.astype(np.int64) @ weight.astype(np.int64).T)


@x86
def test_tokens_of_many_panels_on_several_threads(without_vnni):
    x, weight = operands(1001, 130, 900, bits=3)
    torch.set_num_threads(2)
    assert np.array_equal(multiply(int_mm, x, weight, 3), x.astype(np.int64) @ weight.astype(np.int64).T)


@x86
def test_a_processor_without_these_instructions_says_so(fresh_library, monkeypatch, without_vnni):
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-mno-avx2", "-mno-avx512f", "-O1"))
    assert native.native_library().multiply is None
    assert why_no_int_mm() == "this processor has neither VNNI nor AVX2"
    x, weight = operands(3, 4, 70, bits=2)
    assert np.array_equal(multiply(int_mm, x, weight, 2), x.astype(np.int64) @ weight.astype(np.int64).T)
