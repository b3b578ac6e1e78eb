"""The Triton kernels, run by Triton's interpreter in a process of its own: it must be on before Triton is imported."""

import importlib.util

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton; Linux only)"
)

COMMON = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import itertools
import torch
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
from diffusers_bitsfusion.codec.grid import half_range
from diffusers_bitsfusion.codec.radix import pack_dense
from diffusers_bitsfusion.ops.activations import quantize_image, quantize_tokens, rescale_reference
"""

DECODING = """
from diffusers_bitsfusion.ops.decode import decode_reference
from diffusers_bitsfusion.ops.triton_decode import decode_triton
for bits, columns, dtype in itertools.product(
    range(1, 9), (1, 64, 1001), (torch.float32, torch.bfloat16, torch.int8)
):
    half = half_range(bits)
    codes = torch.randint(-half, half + 1, (3, columns), dtype=torch.int8)
    dense, scale = pack_dense(codes, bits), torch.rand(3) + 0.01
    expected = decode_reference(dense, scale, bits, columns, torch.empty(3, columns, dtype=dtype))
    # Beyond the row's end nothing may be written.
    memory = torch.full((3 * columns + 8,), 77, dtype=dtype)
    found = decode_triton(dense, scale, bits, columns, memory[: 3 * columns].view(3, columns))
    if dtype == torch.bfloat16:  # the interpreter cuts off what a GPU rounds
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, expected), (bits, columns, dtype)
    assert (memory[3 * columns :] == 77).all(), (bits, columns, dtype)
"""

LINEAR = """
from diffusers_bitsfusion.ops.triton_int8 import linear_triton
for (tokens, inputs, outputs), bias, dtype in itertools.product(
    ((0, 5, 3), (1, 1, 1), (7, 33, 11), (16, 64, 128), (130, 70, 140)), (True, False), (torch.float32, torch.bfloat16)
):
    codes, token_scale = quantize_tokens(torch.randn(tokens, inputs))
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    weight_scale, offset = torch.rand(outputs), torch.randn(outputs) if bias else None
    sums = codes.int() @ weight.int().T
    expected = rescale_reference(sums, token_scale, weight_scale, offset, torch.empty(sums.shape, dtype=dtype))
    found = linear_triton(codes, token_scale, weight, weight_scale, offset, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-5)
"""

CONV = """
from diffusers_bitsfusion.ops.triton_int8 import conv2d_triton
settings = [
    dict(),
    dict(padding=(1, 1)),
    dict(stride=(2, 1), padding=(2, 0)),
    dict(dilation=(2, 1), padding=(1, 1)),
    dict(groups=3, padding=(1, 1)),
    dict(groups=3, stride=(2, 2), dilation=(1, 2), padding=(0, 2)),
]
defaults = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
cases = [((2, 5, (3, 3)), changes) for changes in settings]
cases += [((1, 1, (1, 1)), {}), ((70, 4, (1, 2)), dict(padding=(1, 0))), ((1, 130, (2, 1)), dict(groups=3))]
for (channels, outputs, kernel), changes in cases:
    options = defaults | changes
    groups = options["groups"]
    x = torch.randn(2, channels * groups, 7, 8) + 0.4
    image, image_scale, zero_point = quantize_image(x.to(memory_format=torch.channels_last))
    weight = torch.randint(-127, 128, (outputs * groups, channels, *kernel), dtype=torch.int8)
    weight_scale, bias = torch.rand(outputs * groups), torch.randn(outputs * groups)
    exact = image.double() - zero_point.double()
    sums = torch.nn.functional.conv2d(exact, weight.double(), None, **options)
    expected = sums * image_scale.double() * weight_scale.double()[:, None, None]
    ordered = weight.flatten(2).transpose(1, 2).contiguous()
    for offset in (bias, None):
        found = conv2d_triton(
            image, image_scale, zero_point, ordered, weight_scale, offset, kernel, dtype=torch.float32, **options
        )
        wanted = expected if offset is None else expected + offset.double()[:, None, None]
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-4)
"""

LAYERS = """
from diffusers_bitsfusion.ops import conv, linear
scale, bias = torch.rand(6), torch.randn(6)
codes, token_scale = quantize_tokens(torch.randn(9, 20))
weight = torch.randint(-4, 5, (6, 20), dtype=torch.int8)
arguments = (codes, token_scale, weight, scale, bias, torch.float32)
on_cpu = linear._multiply_on_cpu(codes, token_scale, weight, 3, scale, bias, torch.float32)
torch.testing.assert_close(linear._multiply_on_gpu(*arguments), on_cpu)
plain = torch.randint(-4, 5, (6, 4, 3, 2), dtype=torch.int8)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x, settings = torch.randn(2, 8, 6, 7).to(dtype), ((2, 1), (1, 0), (1, 2), 2)
    on_cpu = torch.ops.onednn.qconv_prepack(plain, scale, 1.0, 1, *settings, None)
    on_gpu = plain.flatten(2).transpose(1, 2).contiguous()
    expected = conv._multiply_on_cpu(x, on_cpu, scale, bias, plain.shape, settings).to(dtype)
    found = conv._multiply_on_gpu(x, on_gpu, scale, bias, plain.shape, settings)
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-4)
"""


def test_kernels_equal_the_reference_and_layers_call_them_rightly(run_python):
    result = run_python(COMMON + DECODING + LINEAR + CONV + LAYERS)
    assert result.returncode == 0, result.stderr[-3000:]
