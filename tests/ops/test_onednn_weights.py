"""The layout of weights for oneDNN's integer convolution: what our loops write is what oneDNN lays out."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_bitsfusion.codec.native import native_library
from diffusers_bitsfusion.ops import onednn_weights
from diffusers_bitsfusion.ops.onednn_weights import lay_out, lay_out_in_place
from diffusers_bitsfusion.ops.select import why_no_int8

pytestmark = pytest.mark.skipif(why_no_int8(torch.device("cpu")) is not None, reason="integers need oneDNN on x86")

CPUINFO = Path("/proc/cpuinfo")
VNNI = CPUINFO.exists() and "avx512_vnni" in CPUINFO.read_text()


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(onednn_weights._kept, "tensors", {}, raising=False)


def contents(tensor) -> bytes:
    return ctypes.string_at(torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor))


def weight(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)


def assert_written_alike(shape, geometry):
    for seed in range(3):  # the first is laid out by oneDNN, the others by us where we can
        plain, scale = weight(shape, seed), torch.ones(shape[0])
        assert contents(lay_out_in_place(plain, scale, geometry)) == contents(lay_out(plain, scale, geometry))


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
    onednn_weights._kept.tensors.clear()
    assert_written_alike((outputs * groups, inputs, *kernel), ([stride] * 2, [1, 1], [dilation] * 2, groups))


@pytest.mark.skipif(not VNNI or native_library() is None, reason="the layout of processors with AVX-512 VNNI")
@pytest.mark.parametrize(
    "shape", [(320, 320, 3, 3), (640, 960, 3, 3), (320, 320, 1, 1), (64, 4, 3, 3), (40, 24, 3, 3)]
)
def test_the_layout_is_known_and_the_memory_used_again(shape):
    geometry = [1, 1], [1, 1], [1, 1], 1
    assert_written_alike(shape, geometry)
    (kept,) = onednn_weights._kept.tensors.values()
    assert lay_out_in_place(weight(shape, 9), torch.ones(shape[0]), geometry) is kept[0]


@pytest.mark.parametrize("shape", [(128, 64, 3, 3), (16, 16, 3, 3), (32, 4, 1, 1), (64, 4, 1, 1)])
def test_weights_of_zeros_do_not_mislead_about_those_after_them(shape):
    geometry = [1, 1], [1, 1], [1, 1], 1
    zeros, scale = torch.zeros(shape, dtype=torch.int8), torch.ones(shape[0])
    assert contents(lay_out_in_place(zeros, scale, geometry)) == contents(lay_out(zeros, scale, geometry))
    assert_written_alike(shape, geometry)


def test_weights_of_one_shape_and_different_convolutions_are_kept_apart():
    for geometry in (([1, 1], [1, 1], [1, 1], 1), ([2, 2], [0, 0], [1, 1], 1)):
        assert_written_alike((64, 64, 3, 3), geometry)
    assert len(onednn_weights._kept.tensors) == (0 if native_library() is None else 2)
