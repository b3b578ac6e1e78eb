"""Layers in integer arithmetic, against the same integers in numpy, and against the exact layers."""

import pickle

import numpy as np
import pytest
import torch
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusers_bitsfusion.codec.radix import unpack_dense
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.nn.conversion import float_from_packed, pack_weight, packed_from_float
from diffusers_bitsfusion.nn.packed import float_bits
from diffusers_bitsfusion.ops import activations, decode, kernels
from diffusers_bitsfusion.ops import conv as conv_module
from diffusers_bitsfusion.ops import linear as linear_module

pytestmark = pytest.mark.usefixtures("one_thread")

EPSILON = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}

# Codes of 8 bits are computed exactly where there is no VNNI (tests/ops/test_dispatch.py).
bits_in_integers = st.integers(1, 8 if torch.cpu._is_vnni_supported() else 7)

residents = pytest.mark.parametrize("resident", ["packed", "int8"])


def int8_layer(kind, *sizes, bits=2, resident="packed", dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    layer = kind(*sizes, **options).to(dtype)
    packed = packed_from_float(layer, bits, dtype)
    pack_weight(packed, layer.weight, Rounding())
    packed.set_compute("int8", resident)
    return packed


def integer_codes(packed):
    return (
        unpack_dense(packed.codes, packed.bits, packed.columns).numpy().reshape(packed.weight_shape).astype(np.int64)
    )


def numpy_linear(packed, x):
    x = x.float().numpy().reshape(-1, x.shape[-1])
    span = np.maximum(np.abs(x).max(axis=1, initial=0), np.float32(1e-30))
    codes = np.rint(x * (np.float32(127) / span)[:, None]).astype(np.int64)
    scale = (span / np.float32(127)).astype(np.float64)
    return codes @ integer_codes(packed).T * packed.scale.view(torch.float32).numpy().T * scale[:, None]


def numpy_conv(packed, x):
    """The integers of every kernel position, summed; zero padding of numbers only."""
    x = x.float().numpy()
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    span = max(np.float32(high - low), np.float32(1e-30))
    zero = np.rint(-low * (np.float32(255) / span))
    codes = (np.clip(np.rint(x * (np.float32(255) / span)) + zero, 0, 255) - zero).astype(np.int64)
    (ph, pw), (sh, sw), (dh, dw) = packed.padding, packed.stride, packed.dilation
    codes = np.pad(codes, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    weight, groups = integer_codes(packed), packed.groups
    outputs, inputs, kh, kw = weight.shape
    height = (codes.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (codes.shape[3] - dw * (kw - 1) - 1) // sw + 1
    sums = np.zeros((len(x), groups, outputs // groups, height, width), dtype=np.int64)
    grouped = codes.reshape(len(x), groups, inputs, *codes.shape[2:])
    weight = weight.reshape(groups, outputs // groups, inputs, kh, kw)
    for i in range(kh):
        for j in range(kw):
            window = grouped[..., i * dh :: sh, j * dw :: sw][..., :height, :width]
            sums += np.einsum("bgchw,goc->bgohw", window, weight[..., i, j])
    sums = sums.reshape(len(x), outputs, height, width)
    return sums * packed.scale.view(torch.float32).numpy()[:, :, None] * float(span / np.float32(255))


def assert_equal_integers(found, products, bias, dtype):
    """A sum off by one would show: the tolerance is a few units in the last place of the output's dtype."""
    expected = products if bias is None else products + bias
    size = np.abs(products) + (0 if bias is None else np.abs(bias))
    assert (np.abs(found.double().numpy() - expected) <= EPSILON[dtype] * size + 1e-30).all()


@residents
@given(
    inputs=st.integers(1, 90),
    outputs=st.integers(1, 40),
    bits=bits_in_integers,
    batch=st.lists(st.integers(0, 3), max_size=3),
    bias=st.booleans(),
    dtype=st.sampled_from(list(EPSILON)),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=40)
def test_a_linear_layer_multiplies_the_integers_of_numpy(resident, inputs, outputs, bits, batch, bias, dtype, seed):
    layer = int8_layer(
        nn.Linear, inputs, outputs, bits=bits, resident=resident, dtype=dtype, seed=seed, bias=bias
    ).requires_grad_(False)
    x = torch.randn(*batch, inputs).to(dtype)
    found = layer(x)
    assert found.shape == (*batch, outputs) and found.dtype == dtype
    offset = layer.bias.double().numpy() if bias else None
    assert_equal_integers(found.reshape(-1, outputs), numpy_linear(layer, x), offset, dtype)


@residents
@pytest.mark.parametrize("outputs", [1, 5])
def test_products_of_single_channels_do_not_overflow(resident, outputs):
    layer = int8_layer(nn.Linear, 1, outputs, bits=8, resident=resident).requires_grad_(False)
    x = torch.randn(6, 1)
    assert_equal_integers(layer(x), numpy_linear(layer, x), layer.bias.double().numpy(), torch.float32)


@residents
@pytest.mark.parametrize("sizes", [(1, 1), (33, 7)])
def test_sums_of_many_tokens_are_made_in_blocks(resident, sizes, monkeypatch):
    layer = int8_layer(nn.Linear, *sizes, resident=resident)
    x = torch.randn(23, sizes[0])
    with torch.no_grad():
        expected = layer(x)
        monkeypatch.setattr(linear_module, "MAX_SUMS", 4 * sizes[1])
        monkeypatch.setattr(linear_module, "_FEWEST_TOKENS", 3)
        assert torch.equal(layer(x), expected)


@residents
def test_sums_of_many_positions_are_made_in_blocks(resident, monkeypatch):
    layer = int8_layer(nn.Conv2d, 5, 7, 3, padding=1, resident=resident)
    x = torch.randn(2, 5, 9, 4)
    with torch.no_grad():
        expected = layer(x)
        monkeypatch.setattr(conv_module, "MAX_SUMS", 10 * 7)  # 72 positions, ten at a time
        assert torch.equal(layer(x), expected)


convolutions = {
    "channels": st.integers(1, 7),
    "outputs": st.integers(1, 7),
    "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
    "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    "groups": st.integers(1, 3),
    "bits": bits_in_integers,
    "bias": st.booleans(),
    "batch": st.integers(1, 3),
}


def int8_conv(channels, outputs, kernel, groups, **options):
    return int8_layer(nn.Conv2d, channels * groups, outputs * groups, kernel, groups=groups, **options)


@residents
@given(dtype=st.sampled_from(list(EPSILON)), **convolutions)
@settings(deadline=None, max_examples=40)
def test_a_convolution_multiplies_the_integers_of_numpy(resident, dtype, batch, bias, **options):
    layer = int8_conv(resident=resident, dtype=dtype, bias=bias, **options).requires_grad_(False)
    x = (torch.randn(batch, layer.in_channels, 8, 9) + 0.3).to(dtype)
    found = layer(x)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    offset = layer.bias.double().numpy()[:, None, None] if bias else None
    assert_equal_integers(found, numpy_conv(layer, x), offset, dtype)


def leave_nonsense_in_freed_memory():
    """So that an output which was never written does not happen to hold zeros."""
    for size in (4, 16, 64, 256, 1024, 4096):
        torch.full((size,), -1e9)


@residents
@pytest.mark.parametrize(("kernel", "padding"), [((2, 1), (2, 0)), ((3, 3), (4, 1)), ((1, 2), (1, 2))])
@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_that_see_only_padding_are_the_bias(resident, kernel, padding, groups):
    layer = int8_conv(1, 3, kernel, groups, padding=padding, resident=resident).requires_grad_(False)
    for _ in range(3):
        x = torch.randn(1, groups, 8, 9)
        leave_nonsense_in_freed_memory()
        found = layer(x)
        assert_equal_integers(found, numpy_conv(layer, x), layer.bias.double().numpy()[:, None, None], torch.float32)
        assert torch.equal(found[0, :, 0, 0], layer.bias)


@residents
@given(mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]), **convolutions)
@settings(deadline=None, max_examples=25)
def test_any_padding_is_near_the_exact_layer_and_has_its_gradients(resident, mode, batch, **options):
    layer = int8_conv(resident=resident, padding_mode=mode, **options)
    exact = float_from_packed(layer)
    x = torch.randn(batch, layer.in_channels, 8, 9, requires_grad=True)
    x_reference = x.detach().clone().requires_grad_()
    found, expected = layer(x), exact(x_reference)
    # Half a step of the inputs, over all products of an output.
    bound = (x.detach().max() - x.detach().min()) / 255 * exact.weight.detach().abs().sum((1, 2, 3))
    assert ((found - expected).abs() <= 0.51 * bound[:, None, None] + 1e-5).all()
    grad = torch.randn_like(expected)
    found.backward(grad)
    bias_grad = None if layer.bias is None else layer.bias.grad.clone()
    layer.zero_grad()
    expected.backward(grad)
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=1e-4, atol=1e-4)
    if bias_grad is not None:
        torch.testing.assert_close(bias_grad, exact.bias.grad, rtol=1e-4, atol=1e-4)


@residents
def test_a_linear_layer_is_near_the_exact_one_and_has_its_gradients(resident):
    layer = int8_layer(nn.Linear, 300, 50, resident=resident)
    x = torch.randn(4, 6, 300, requires_grad=True)
    found = layer(x)
    assert 0 < relative_error(found, float_from_packed(layer)(x)) < 0.01
    grad = torch.randn_like(found)
    found.backward(grad)
    torch.testing.assert_close(x.grad, grad @ float_from_packed(layer).weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)), rtol=1e-5, atol=1e-5)


@residents
@pytest.mark.parametrize(
    "padding", [{}, {"padding": 1}, {"padding": "same"}, {"padding_mode": "circular", "padding": 1}]
)
def test_an_empty_batch_of_images_works(resident, padding):
    layer = int8_layer(nn.Conv2d, 3, 5, 3, resident=resident, **padding)
    x = torch.randn(0, 3, 6, 6, requires_grad=True)
    y = layer(x)
    assert y.shape == float_from_packed(layer)(x).shape
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_an_image_without_a_batch_works():
    layer = int8_layer(nn.Conv2d, 3, 5, 3, padding=1)
    x = torch.randn(3, 6, 6)
    assert torch.equal(layer(x), layer(x[None])[0])


@residents
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_bad_activations_show_in_the_output(resident, kind):
    layer = int8_layer(kind, *((8, 4) if kind is nn.Linear else (8, 4, 3)), resident=resident)
    x = torch.randn((2, 8) if kind is nn.Linear else (2, 8, 5, 5))
    x.flatten()[0] = float("nan")
    assert layer(x)[0].isnan().all()


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_kept_codes_and_decoded_ones_give_the_same_bits(kind):
    sizes = (40, 24) if kind is nn.Linear else (40, 24, 3)
    x = torch.randn((3, 40) if kind is nn.Linear else (3, 40, 6, 6))
    packed, kept = (int8_layer(kind, *sizes, bits=3, resident=r) for r in ("packed", "int8"))
    assert torch.equal(packed(x), kept(x))


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_kept_codes_serve_other_scales(kind):
    sizes = (8, 6) if kind is nn.Linear else (8, 6, 3)
    layer = int8_layer(kind, *sizes, resident="int8").requires_grad_(False)
    x = torch.randn(3, 8) if kind is nn.Linear else torch.randn(2, 8, 5, 5)
    layer.bias.zero_()
    before = layer(x)
    layer.scale = float_bits(layer.scale.view(torch.float32) * 4)
    torch.testing.assert_close(layer(x), 4 * before)


def test_kept_codes_are_not_decoded_again(decodes):
    layer = int8_layer(nn.Conv2d, 4, 6, 3, resident="int8")
    decodes.update(read=0, call=0)
    with torch.no_grad():
        layer(torch.randn(1, 4, 6, 6))
    assert decodes == {"read": 0, "call": 0}


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_without_a_compiler_the_outputs_are_the_same(monkeypatch, kind):
    layer = int8_layer(kind, *((40, 24) if kind is nn.Linear else (40, 24, 3)))
    x = torch.randn((3, 40) if kind is nn.Linear else (3, 40, 6, 6))
    expected = layer(x)
    for module in (activations, decode, kernels):
        monkeypatch.setattr(module, "native_library", lambda: None)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


@residents
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_torchs_default_dtype_changes_nothing(resident, dtype, default):
    linear = int8_layer(nn.Linear, 40, 24, resident=resident, dtype=dtype, bias=False)
    convolution = int8_layer(nn.Conv2d, 4, 6, 3, resident=resident, dtype=dtype)
    inputs = torch.randn(600, 40, dtype=dtype), torch.randn(1, 4, 20, 20, dtype=dtype)
    expected = [layer(x) for layer, x in zip((linear, convolution), inputs, strict=True)]
    gated = linear(inputs[0], geglu=True)
    torch.set_default_dtype(default)  # as `from_pretrained(dtype=...)` does, for all threads
    try:
        found = [layer(x) for layer, x in zip((linear, convolution), inputs, strict=True)]
        assert all(torch.equal(y, wanted) for y, wanted in zip(found, expected, strict=True))
        assert torch.equal(linear(inputs[0], geglu=True), gated)
    finally:
        torch.set_default_dtype(torch.float32)


@residents
def test_inputs_of_another_width_are_refused_as_by_torch(resident):
    linear, convolution = (int8_layer(nn.Linear, 8, 6, resident=resident), int8_layer(nn.Conv2d, 8, 6, 3, groups=2))
    for width in (4, 16):
        with pytest.raises(RuntimeError, match=f"mat1 and mat2 shapes cannot be multiplied \\(3x{width} and 8x6\\)"):
            linear(torch.randn(3, width))
        with pytest.raises(RuntimeError, match=f"to have 8 channels, but got {width} channels"):
            convolution(torch.randn(1, width, 5, 5))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear(torch.randn(3, 4), geglu=True)


@pytest.mark.skipif(torch.cpu._is_vnni_supported(), reason="8 bits overflow without VNNI alone")
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_a_pickle_of_another_machine_computes_as_this_one_can(kind):
    layer = int8_layer(kind, *((8, 6) if kind is nn.Linear else (8, 6, 3)), bits=8)
    x = torch.randn(3, 8) if kind is nn.Linear else torch.randn(2, 8, 5, 5)
    exact = layer(x)
    layer.computes_int8 = True  # as where there is VNNI
    again = pickle.loads(pickle.dumps(layer))
    assert not again.computes_int8 and torch.equal(again(x), exact)
