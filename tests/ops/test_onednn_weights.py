"""The layout of weights for oneDNN's integer convolution: what the compiled loops write is what oneDNN lays out."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_bitsfusion.codec.quantize_dense import quantize_to_dense
from diffusers_bitsfusion.native.library import native_library
from diffusers_bitsfusion.nn.conv import BitsFusionConv2d
from diffusers_bitsfusion.ops import onednn_weights
from diffusers_bitsfusion.ops.dispatch import why_no_int8
from diffusers_bitsfusion.ops.onednn_weights import prepack, prepack_by_onednn, prepack_in_place

pytestmark = pytest.mark.skipif(why_no_int8(torch.device("cpu")) is not None, reason="integers need oneDNN on x86")

CPUINFO = Path("/proc/cpuinfo")
VNNI = CPUINFO.exists() and "avx512_vnni" in CPUINFO.read_text()


def forget():
    onednn_weights._layouts.clear()
    onednn_weights._scratch.__dict__.clear()
    onednn_weights._kept.clear()


@pytest.fixture(autouse=True)
def nothing_known():
    forget()


def contents(tensor) -> bytes:
    return ctypes.string_at(torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor))


def weight(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)


def assert_written_alike(shape, geometry):
    weights = [weight(shape, seed) for seed in range(3)]
    scale = torch.rand(shape[0], generator=torch.Generator().manual_seed(0)) * 100  # on which no layout may depend
    expected = [contents(prepack_by_onednn(plain, scale, geometry)) for plain in weights]
    for plain, wanted in zip(weights, expected, strict=True):
        assert contents(prepack_in_place(plain, scale, geometry)) == wanted
    kept = [prepack(plain, scale, geometry) for plain in weights]
    prepack_in_place(weight(shape, 3), scale, geometry)
    assert [contents(tensor) for tensor in kept] == expected
    for plain, tensor in zip(weights, kept, strict=True):
        assert_multiplied(plain, tensor, geometry)


def assert_multiplied(plain, tensor, geometry):
    """Compare the integer convolution of a laid-out weight with sums in fp64, which are exact for such integers."""
    stride, padding, dilation, groups = geometry
    outputs, inputs, height, width = plain.shape
    size = [span * (step - 1) + 2 for span, step in zip(dilation, (height, width), strict=True)]
    generator = torch.Generator().manual_seed(4)
    image = torch.randint(0, 127, (1, inputs * groups, *size), dtype=torch.uint8, generator=generator)
    found = torch.ops.onednn.qconv2d_pointwise.tensor(
        image.contiguous(memory_format=torch.channels_last),
        torch.tensor(1.0),
        torch.tensor(0, dtype=torch.int32),
        tensor,
        torch.ones(outputs),
        torch.zeros(outputs, dtype=torch.int32),
        None,
        *geometry,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    assert torch.equal(
        found.double(), F.conv2d(image.double(), plain.double(), None, stride, padding, dilation, groups)
    )


@given(
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 100),
    kernel=st.sampled_from([(1, 1), (3, 3), (1, 3), (4, 2)]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 1, 2, 5]),
)
@settings(deadline=None, max_examples=40)
def test_every_weight_has_the_bytes_that_onednn_gives_it(outputs, inputs, kernel, stride, dilation, groups):
    forget()
    assert_written_alike((outputs * groups, inputs, *kernel), ([stride] * 2, [1, 1], [dilation] * 2, groups))


@pytest.mark.skipif(not VNNI or native_library() is None, reason="the layout of processors with AVX-512 VNNI")
@pytest.mark.parametrize(
    "shape", [(320, 320, 3, 3), (640, 960, 3, 3), (320, 320, 1, 1), (64, 4, 3, 3), (40, 24, 3, 3)]
)
def test_the_layout_is_known_and_the_memory_used_again(monkeypatch, shape):
    geometry, scale = ([1, 1], [1, 1], [1, 1], 1), torch.ones(shape[0])
    assert_written_alike(shape, geometry)
    (scratch,) = onednn_weights._scratch.tensors.values()
    kept = prepack(weight(shape, 8), scale, geometry)
    monkeypatch.setattr(onednn_weights, "prepack_by_onednn", None)  # it is no longer asked
    assert prepack_in_place(weight(shape, 9), scale, geometry) is scratch
    assert torch.ops.mkldnn.data_ptr(prepack(weight(shape, 9), scale, geometry)) != torch.ops.mkldnn.data_ptr(kept)


def test_layouts_are_made_on_the_cpu_whatever_the_default_device_is():
    shape, geometry = (64, 4, 3, 3), ([1, 1], [1, 1], [1, 1], 1)
    plain, scale = weight(shape, 0), torch.ones(shape[0])
    with torch.device("meta"):  # stands for a GPU
        tensors = prepack(plain, scale, geometry), prepack_in_place(plain, scale, geometry)
    expected = contents(prepack_by_onednn(plain, scale, geometry))
    assert [contents(tensor) for tensor in tensors] == [expected] * 2


def test_padding_that_nobody_initialises_does_not_hide_a_layout(monkeypatch):
    tensor = prepack(weight((64, 4, 3, 3), 0), torch.ones(64), ([1, 1], [1, 1], [1, 1], 1))
    serialize = torch.ops.mkldnn._get_mkldnn_serialized_md

    class Operators:
        @staticmethod
        def _get_mkldnn_serialized_md(tensor):
            descriptor = serialize(tensor).clone()
            for start in (4, 108, 316, 420):
                descriptor[start : start + 4] = torch.randint(0, 256, (4,), dtype=torch.uint8)
            return descriptor

    expected = onednn_weights._descriptor(tensor)
    monkeypatch.setattr(onednn_weights.torch.ops, "mkldnn", Operators)
    assert onednn_weights._descriptor(tensor) == expected


def test_layouts_of_different_blocks_have_different_descriptors():
    found = set()
    for shape in ((320, 320, 3, 3), (640, 320, 3, 3), (320, 320, 1, 1)):
        tensor = prepack_by_onednn(weight(shape, 0), torch.ones(shape[0]), ([1, 1], [1, 1], [1, 1], 1))
        found.add(onednn_weights._descriptor(tensor))
    assert len(found) == 3


def test_tensors_are_kept_by_models_alone():
    layout = prepack(weight((64, 4, 3, 3), 0), torch.ones(64), ([1, 1], [1, 1], [1, 1], 1))
    assert len(onednn_weights._kept) == 1
    del layout
    assert not onednn_weights._kept


@pytest.mark.parametrize("shape", [(128, 64, 3, 3), (16, 16, 3, 3), (32, 4, 1, 1), (64, 4, 1, 1)])
def test_weights_of_zeros_do_not_mislead_about_those_after_them(shape):
    geometry = [1, 1], [1, 1], [1, 1], 1
    zeros, scale = torch.zeros(shape, dtype=torch.int8), torch.ones(shape[0])
    assert contents(prepack_in_place(zeros, scale, geometry)) == contents(prepack_by_onednn(zeros, scale, geometry))
    assert_written_alike(shape, geometry)


def test_weights_of_one_shape_and_different_convolutions_are_kept_apart():
    for geometry in (([1, 1], [1, 1], [1, 1], 1), ([2, 2], [0, 0], [1, 1], 1)):
        assert_written_alike((64, 64, 3, 3), geometry)
    assert len(onednn_weights._layouts) == (0 if native_library() is None else 2)


@pytest.fixture
def threads():
    """Sets how many threads torch computes with."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# oneDNN lays these out in other blocks at three threads than at two, the last in as many bytes.
CHANGING = [(80, 96, 3, 3), (33, 5, 1, 1), (96, 80, 3, 3)]


@pytest.mark.parametrize("shape", CHANGING)
def test_a_tensor_of_another_layout_is_never_written_over(monkeypatch, threads, shape):
    monkeypatch.setattr(
        onednn_weights, "current_settings", lambda: ()
    )  # as if the choice depended on something unknown
    for count in (2, 3, 64, 1, 2):
        threads(count)
        assert_written_right(shape)


def assert_written_right(shape):
    """Laid out so that oneDNN multiplies by the weights given, in whatever layout."""
    geometry, image = ([1, 1], [0, 0], [1, 1], 1), weight((1, shape[1], 3, 3), 5).to(torch.uint8)
    scale, zeros = torch.ones(shape[0]), torch.zeros(shape[0], dtype=torch.int32)
    kept = []
    for seed in range(3):
        plain = weight(shape, seed) // 2  # without VNNI pairs of larger products overflow
        expected = torch.nn.functional.conv2d(image.double(), plain.double()).float()
        for arrange in (prepack, prepack_in_place):
            kept.append(arrange(plain, scale, geometry))
            found = torch.ops.onednn.qconv2d_pointwise.tensor(
                *(image.contiguous(memory_format=torch.channels_last), torch.ones(1), zeros[:1], kept[-1], scale),
                *(zeros, None, *geometry, 1.0, 0, torch.float32, "none", [], ""),
            )
            assert torch.equal(found, expected)


def test_kept_weights_are_decoded_anew_where_the_number_of_threads_has_changed(threads, decodes, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)  # Else products are not oneDNN's.
    layer = BitsFusionConv2d.from_float(torch.nn.Conv2d(80, 96, 3), 2, torch.float32)
    layer.set_codes(*quantize_to_dense(torch.randn(96, 80 * 9), 2))
    threads(2)
    layer.set_compute("int8", "int8")
    x, counted = torch.randn(1, 80, 5, 5), []
    for count in (2, 3, 2):
        threads(count)
        decodes["call"] = 0
        layer(x)
        counted.append(decodes["call"])
    assert counted == [0, 1, 0]
