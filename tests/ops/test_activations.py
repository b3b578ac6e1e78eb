"""Activations to eight bits, against the same arithmetic in numpy, by the compiled kernels and by plain torch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_bitsfusion.ops import activations
from diffusers_bitsfusion.ops.activations import (
    geglu,
    geglu_reference,
    quantize_image,
    quantize_image_reference,
    quantize_tokens,
    quantize_tokens_reference,
    rescale,
    rescale_geglu,
    rescale_geglu_reference,
    rescale_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
both_token_ways = pytest.mark.parametrize("quantize", [quantize_tokens, quantize_tokens_reference])
both_image_ways = pytest.mark.parametrize("quantize", [quantize_image, quantize_image_reference])


def numpy_tokens(x):
    span = np.maximum(np.abs(x).max(axis=1), np.float32(1e-30))
    codes = np.rint(x * (np.float32(127) / span)[:, None])
    return codes.astype(np.int8), span / np.float32(127)


def numpy_image(x):
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    span = max(np.float32(high - low), np.float32(1e-30))
    inverse = np.float32(255) / span
    zero = np.rint(-low * inverse)
    return np.clip(np.rint(x * inverse) + zero, 0, 255).astype(np.uint8), span / np.float32(255), int(zero)


def values(shape, seed, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + 0.1).to(dtype)


@both_token_ways
@every_dtype
@given(
    rows=st.integers(0, 7),
    columns=st.integers(1, 200),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-12, 12),
)
@settings(deadline=None, max_examples=25)
def test_tokens_are_rounded_as_in_numpy(quantize, dtype, rows, columns, seed, exponent):
    x = values((rows, columns), seed, dtype, 2.0**exponent)
    codes, scale = quantize(x)
    expected_codes, expected_scale = numpy_tokens(x.float().numpy())
    assert np.array_equal(codes.numpy(), expected_codes)
    assert np.array_equal(scale.numpy(), expected_scale)


@both_image_ways
@every_dtype
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 4), seed=st.integers(0, 10**6), shift=st.sampled_from([-9.0, 0.0, 0.5, 9.0])
)
@settings(deadline=None, max_examples=25)
def test_images_are_rounded_as_in_numpy(quantize, dtype, shape, seed, shift):
    x = values(shape, seed, dtype) + shift
    codes, scale, zero_point = quantize(x)
    expected_codes, expected_scale, expected_zero = numpy_image(x.float().numpy())
    assert np.array_equal(codes.numpy(), expected_codes)
    assert (scale.item(), zero_point.item()) == (expected_scale, expected_zero)
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)


@pytest.mark.parametrize("threads", [1, 3])
def test_large_images_are_rounded_alike_by_several_threads(threads):
    x = values((3, 40, 64, 67), 0)
    x[-1, -1, -1, -1], x[0, 0, 0, 0] = 9.0, -7.0  # the extremes lie in different threads' shares
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        codes, scale, zero_point = quantize_image(x)
    finally:
        torch.set_num_threads(before)
    expected = quantize_image_reference(x)
    assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1]) and torch.equal(zero_point, expected[2])


@both_image_ways
@pytest.mark.parametrize("layout", ["channels last", "sliced", "transposed"])
def test_any_layout_of_an_image_gives_the_same_codes(quantize, layout):
    x = values((2, 6, 5, 8), 1)
    laid_out = {
        "channels last": x.to(memory_format=torch.channels_last),
        "sliced": torch.cat([x, x + 5], dim=3)[..., :8],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    assert torch.equal(quantize(laid_out)[0], quantize(x)[0])


def test_a_channels_last_image_stays_so():
    x = values((2, 6, 5, 8), 1).to(memory_format=torch.channels_last)
    assert quantize_image(x)[0].is_contiguous(memory_format=torch.channels_last)


@both_token_ways
def test_a_token_of_zeros_has_codes_of_zero(quantize):
    codes, scale = quantize(torch.zeros(2, 5))
    assert not codes.any() and (scale > 0).all()


@both_image_ways
@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, -3.0, 1e-38])
def test_a_constant_image_comes_back(quantize, value):
    codes, scale, zero_point = quantize(torch.full((1, 2, 3, 3), value))
    restored = (codes.to(torch.int32) - zero_point) * scale
    assert torch.allclose(restored, torch.full((1, 2, 3, 3), value), rtol=1e-6, atol=1e-30)


@both_image_ways
@given(low=st.floats(-50, 50, width=32), high=st.floats(-50, 50, width=32))
@settings(deadline=None, max_examples=50)
def test_zero_is_exact_in_every_range_so_that_padding_is(quantize, low, high):
    codes, _, zero_point = quantize(torch.tensor([[[[low, high, 0.0]]]]))
    assert codes.flatten()[2] == zero_point


@both_token_ways
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_make_their_token_bad_and_no_other(quantize, bad):
    x = values((3, 40), 2)
    x[1, 17] = bad
    scale = quantize(x)[1]
    assert not scale[1].isfinite() and scale[[0, 2]].isfinite().all()


@both_image_ways
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_bad_values_make_an_image_bad(quantize, bad):
    x = values((1, 2, 5, 5), 2)
    x[0, 1, 2, 3] = bad
    assert not quantize(x)[1].isfinite()


@pytest.mark.parametrize("kernel", [rescale, rescale_reference])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_scaled_by_token_and_by_output(kernel, bias, dtype):
    generator = torch.Generator().manual_seed(3)
    sums = torch.randint(-(2**22), 2**22, (5, 37), generator=generator, dtype=torch.int32)
    token, weight = torch.rand(5, generator=generator), torch.rand(37, generator=generator)
    offset = torch.randn(37, generator=generator) if bias else None
    found = kernel(sums, token, weight, offset, torch.empty(5, 37, dtype=dtype))
    expected = sums.double() * weight.double() * token.double()[:, None] + (offset.double() if bias else 0)
    assert found.dtype == dtype
    tolerance = max(torch.finfo(dtype).eps, 3e-7)
    if dtype == torch.float16:
        expected = expected.clamp(-7e4, 7e4).half().double()  # to infinity past its range
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("kernel", [rescale_geglu, rescale_geglu_reference])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(0, 5), half=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_gated_sums_are_the_product_with_the_normal_integral(kernel, bias, dtype, rows, half, seed):
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randint(-(2**22), 2**22, (rows, 2 * half), generator=generator, dtype=torch.int32)
    token, weight = 1e-3 * torch.rand(rows, generator=generator), 1e-3 * torch.rand(2 * half, generator=generator)
    offset = torch.randn(2 * half, generator=generator) if bias else None
    found = kernel(sums, token, weight, offset, torch.empty(rows, half, dtype=dtype))
    y = sums.double() * weight.double() * token.double()[:, None] + (offset.double() if bias else 0)
    hidden, gate = y.chunk(2, dim=1)
    expected = hidden * gate * 0.5 * torch.special.erfc(-gate / 2**0.5)
    error = (found.double() - expected).abs()
    # Roundings of the halves themselves, of the integral, of the product, and of the output.
    bound = 1e-6 * (hidden.abs() + 1) * (gate.abs() + 1) + torch.finfo(dtype).eps * expected.abs()
    assert (error <= bound).all()


@pytest.mark.parametrize("kernel", [rescale_geglu, rescale_geglu_reference])
def test_large_gates_pass_or_stop_what_they_gate_and_bad_ones_are_bad(kernel):
    sums = torch.tensor([[3, 3, 3, 3, 1000, -1000, 0, 1]], dtype=torch.int32)
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, float("nan")])
    found = kernel(sums, torch.ones(1), weight, None, torch.empty(1, 4))
    assert found[0].tolist() == pytest.approx([3000.0, 0.0, 0.0, float("nan")], nan_ok=True)


def test_without_a_compiler_plain_torch_serves(monkeypatch):
    x = values((4, 33), 5)
    expected = quantize_tokens(x), quantize_image(x)
    monkeypatch.setattr(activations, "native_library", lambda: None)
    for found, wanted in zip((quantize_tokens(x), quantize_image(x)), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kernel", [geglu, geglu_reference])
@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(0, 5), half=st.integers(1, 70), seed=st.integers(0, 1000), exponent=st.integers(-3, 3))
@settings(deadline=None, max_examples=20)
def test_halves_are_gated_by_the_normal_integral(kernel, dtype, rows, half, seed, exponent):
    x = (values((rows, 2 * half), seed) * 2.0**exponent).to(dtype)
    found = kernel(x, torch.empty(rows, half, dtype=dtype))
    hidden, gate = x.double().chunk(2, dim=1)
    expected = hidden * gate * 0.5 * torch.special.erfc(-gate / 2**0.5)
    bound = 1e-6 * (hidden.abs() + 1) * (gate.abs() + 1) + torch.finfo(dtype).eps * expected.abs()
    assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("kernel", [geglu, geglu_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_bad_values_are_bad(kernel, dtype):
    nan, infinite = float("nan"), float("inf")
    x = torch.tensor([[1.0, nan, infinite, 2.0, nan, 1.0, 1.0, -1e30]], dtype=dtype)
    found = kernel(x, torch.empty(1, 4, dtype=dtype))[0].tolist()
    assert all(map(math.isnan, found[:2])) and found[2:] == [infinite, 0.0]
