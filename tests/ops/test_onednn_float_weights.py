"""Weights decoded into oneDNN's layouts of floating point: the bytes that oneDNN itself would write."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusers_bitsfusion.codec.quantize_dense import quantize_to_dense
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.ops import conv as conv_module
from diffusers_bitsfusion.ops import dispatch, onednn_float_weights
from diffusers_bitsfusion.ops import linear as linear_module
from diffusers_bitsfusion.ops.conv import conv2d
from diffusers_bitsfusion.ops.decode import decode_weight
from diffusers_bitsfusion.ops.kernels import PREPACKED, select
from diffusers_bitsfusion.ops.linear import linear
from diffusers_bitsfusion.ops.onednn_float_weights import PackedOperand, prepack_in_place

CPU = torch.device("cpu")
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if select(PREPACKED, CPU, dtype) is not None]
pytestmark = pytest.mark.skipif(not DTYPES, reason="there is no C compiler or oneDNN")


@pytest.fixture(autouse=True)
def nothing_known():
    forget()


def forget():
    onednn_float_weights._blocks_of.clear()
    onednn_float_weights._scratch.__dict__.clear()


@pytest.fixture
def threads():
    """Sets how many threads torch computes with."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def packed_operand(shape, bits, geometry, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator).flatten(1)
    return PackedOperand(*quantize_to_dense(rows, bits, Rounding()), bits, shape, geometry)


def decoded(packed, dtype):
    return decode_weight(packed.codes, packed.scale, packed.bits, packed.shape, dtype)


def contents(tensor) -> bytes:
    return ctypes.string_at(torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor))


def assert_written_as_onednn_does(shape, bits, geometry, dtype, size=9):
    x = torch.zeros(2, shape[1], size, size, dtype=dtype)
    for seed in range(2):
        packed = packed_operand(shape, bits, geometry, seed)
        found = prepack_in_place(packed, x)
        if found is not None:
            expected = onednn_float_weights._by_onednn(decoded(packed, dtype), packed, x)
            assert contents(found) == contents(expected)
    return found


@given(
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 70),
    kernel=st.sampled_from([(1, 1), (3, 3), (1, 3), (4, 2), (5, 5)]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    bits=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=60)
def test_every_weight_has_the_bytes_that_onednn_gives_it(outputs, inputs, kernel, stride, dilation, bits, dtype):
    forget()
    geometry = (stride, stride), (2, 2), (dilation, dilation), 1
    assert_written_as_onednn_does((outputs, inputs, *kernel), bits, geometry, dtype)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(320, 320, 3, 3), (640, 320, 1, 1), (80, 33, 3, 3), (4, 320, 3, 3)])
def test_shapes_of_stable_diffusion_on_any_number_of_threads(threads, shape, dtype, count):
    threads(count)
    found = assert_written_as_onednn_does(shape, 2, ((1, 1), (1, 1), (1, 1), 1), dtype, size=16)
    assert found is not None or "avx512" not in torch.backends.cpu.get_cpu_capability().lower()


def test_memory_is_used_again_and_forgotten_with_its_settings(threads):
    geometry = (1, 1), (1, 1), (1, 1), 1
    first, second = (packed_operand((64, 32, 3, 3), 2, geometry, seed) for seed in (0, 1))
    for size in (8, 12, 16, 20, 24):  # of some of which the weight has the same layout
        x = torch.zeros(1, 32, size, size, dtype=DTYPES[-1])
        tensors = {id(prepack_in_place(packed, x)) for packed in (first, second)}
        assert len(tensors) == 1
    assert len(onednn_float_weights._scratch.tensors) <= len(onednn_float_weights._BLOCKS)
    threads(torch.get_num_threads() + 1)
    prepack_in_place(packed_operand((32, 32, 1, 1), 2, geometry), torch.zeros(1, 32, 8, 8, dtype=DTYPES[-1]))
    assert len(onednn_float_weights._scratch.tensors) <= 1


def test_weights_of_zeros_do_not_mislead_about_those_after_them():
    geometry, x = ((1, 1), (1, 1), (1, 1), 1), torch.zeros(1, 64, 8, 8, dtype=DTYPES[-1])
    packed = packed_operand((64, 64, 3, 3), 2, geometry)
    zeros = PackedOperand(packed.codes, torch.zeros_like(packed.scale), 2, packed.shape, geometry)
    for each in (zeros, packed):
        tensor = prepack_in_place(each, x)
        expected = onednn_float_weights._by_onednn(decoded(each, x.dtype), each, x)
        assert tensor is None or contents(tensor) == contents(expected)


@given(
    batch=st.integers(0, 3),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 1)]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    groups=st.sampled_from([1, 1, 1, 2]),
    bias=st.booleans(),
    memory=st.sampled_from([torch.contiguous_format, torch.channels_last, "strided"]),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=60)
def test_the_convolution_is_torchs(batch, channels, kernel, stride, padding, groups, bias, memory, dtype):
    torch.manual_seed(0)
    layer = nn.Conv2d(channels[0] * groups, channels[1] * groups, kernel, stride, padding, groups=groups, bias=bias)
    geometry = (stride, stride), (padding, padding), (1, 1), groups
    shape = tuple(layer.weight.shape)
    packed = PackedOperand(*quantize_to_dense(layer.weight.detach().flatten(1), 3, Rounding()), 3, shape, geometry)
    x = torch.randn(batch, channels[0] * groups, 7, 12).to(dtype)
    x = x[..., ::2] if memory == "strided" else x.contiguous(memory_format=memory)
    bias = layer.bias.detach().to(dtype) if bias else None
    integers = packed.scale.view(torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_FEWEST_OUTPUTS", 1)
        found = conv2d(x, packed.codes, integers, bias, 3, shape, *geometry, False, None)
    expected = F.conv2d(x.double(), decoded(packed, dtype).double(), None, *geometry)
    expected = expected if bias is None else expected + bias.double().view(-1, 1, 1)
    assert found.dtype == dtype and found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3 if dtype == torch.bfloat16 else 1e-5
    )


def test_where_the_layout_is_unknown_torch_lays_out(monkeypatch):
    monkeypatch.setattr(dispatch, "_FEWEST_OUTPUTS", 1)
    geometry, x = ((1, 1), (1, 1), (1, 1), 1), torch.randn(1, 20, 8, 8).to(DTYPES[-1])
    packed = packed_operand((24, 20, 3, 3), 2, geometry)
    arguments = packed.codes, packed.scale.view(torch.int32), None, 2, packed.shape, *geometry, False, None
    expected = conv2d(x, *arguments)
    forget()
    monkeypatch.setattr(onednn_float_weights, "_BLOCKS", ())
    assert prepack_in_place(packed, x) is None
    torch.testing.assert_close(conv2d(x, *arguments), expected)
    monkeypatch.setattr(conv_module, "_takes_layout", lambda *_: False)
    torch.testing.assert_close(conv2d(x, *arguments), expected)


def test_small_convolutions_in_fp32_have_the_bits_of_the_dequantized_layer():
    geometry, x = ((1, 1), (1, 1), (1, 1), 1), torch.randn(1, 20, 8, 8)
    packed = packed_operand((24, 20, 3, 3), 2, geometry)
    found = conv2d(x, packed.codes, packed.scale.view(torch.int32), None, 2, packed.shape, *geometry, False, None)
    assert torch.equal(found, F.conv2d(x, decoded(packed, torch.float32), None, *geometry))
    assert found.is_contiguous()


def test_inputs_of_other_channels_are_refused_in_torchs_words():
    geometry = (1, 1), (1, 1), (1, 1), 1
    packed = packed_operand((24, 20, 3, 3), 2, geometry)
    with pytest.raises(RuntimeError, match=r"expected input.* to have 20 channels, but got 21"):
        conv2d(
            torch.randn(1, 21, 8, 8).bfloat16(),
            packed.codes, packed.scale.view(torch.int32), None, 2, packed.shape, *geometry, False, None,
        )  # fmt: skip


# Linear layers.


@given(
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 100),
    tokens=st.integers(1, 70),
    bits=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=60)
def test_weights_of_linear_layers_have_the_bytes_that_onednn_gives_them(outputs, inputs, tokens, bits, dtype):
    forget()
    x = torch.zeros(tokens, inputs, dtype=dtype)
    for seed in range(2):
        packed = packed_operand((outputs, inputs), bits, None, seed)
        found = prepack_in_place(packed, x)
        if found is not None:
            assert contents(found) == contents(onednn_float_weights._by_onednn(decoded(packed, dtype), packed, x))


@given(
    batch=st.integers(0, 2),
    tokens=st.integers(0, 40),
    sizes=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    bias=st.booleans(),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_the_linear_layer_is_torchs(batch, tokens, sizes, bias, strided):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_module, "_PREPACKED_TOKENS", 1)
        packed = packed_operand(sizes, 2, None)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, tokens, 2 * sizes[1], generator=generator).bfloat16()
        x = x[..., ::2] if strided else x[..., : sizes[1]].contiguous()
        offset = torch.randn(sizes[0], generator=generator).bfloat16() if bias else None
        found = linear(x, packed.codes, packed.scale.view(torch.int32), offset, 2, sizes, False, None)
    weight, offset = decoded(packed, torch.bfloat16).double(), torch.zeros(sizes[0]) if offset is None else offset
    expected = F.linear(x.double(), weight, offset.double())
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    size = F.linear(x.double().abs(), weight.abs(), offset.double().abs())
    assert ((found.double() - expected).abs() <= 2**-7 * size + 1e-30).all()


def test_inputs_of_other_widths_are_refused_in_torchs_words(monkeypatch):
    monkeypatch.setattr(linear_module, "_PREPACKED_TOKENS", 1)
    packed = packed_operand((24, 20), 2, None)
    arguments = packed.codes, packed.scale.view(torch.int32), None, 2, (24, 20), False, None
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        linear(torch.randn(3, 21).bfloat16(), *arguments)
