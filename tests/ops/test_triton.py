"""The Triton kernels, run by Triton's interpreter in a process of its own: it must be on before Triton is imported."""

import importlib.util

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton; Linux only)"
)

COMMON = """
import importlib
import itertools
import torch
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
from diffusers_bitsfusion.codec.grid import half_range
from diffusers_bitsfusion.codec.radix import pack_dense
from diffusers_bitsfusion.ops.activations import (
    quantize_image_reference,
    quantize_tokens,
    quantize_tokens_reference,
    rescale_reference,
)
"""

DECODING = """
from diffusers_bitsfusion.ops.decode import decode_reference
from diffusers_bitsfusion.ops.triton.decode import decode_triton
dtypes = (torch.float32, torch.bfloat16, torch.int8)
shapes = [(1, 1), (64, 1), (9, 9), (4 * 9, 9), (150 * 9, 9), (30, 2)]
cases = [(*shape, torch.float32) for shape in shapes]
cases += [(*shape, dtype) for shape, dtype in itertools.product([(1001, 1), (40 * 9, 9)], dtypes)]
for bits, (columns, positions, dtype) in itertools.product(range(1, 9), cases):
    half, rows = half_range(bits), 11
    codes = torch.randint(-half, half + 1, (rows, columns), dtype=torch.int8)
    dense, scale = pack_dense(codes, bits), torch.rand(rows) + 0.01
    expected = decode_reference(dense, scale, bits, columns, torch.empty(rows, columns, dtype=dtype))
    expected = expected.view(rows, -1, positions).transpose(1, 2).reshape(rows, columns)
    # Beyond the last row's end nothing may be written.
    memory = torch.full((rows * columns + 8,), 77, dtype=dtype)
    found = decode_triton(dense, scale, bits, columns, memory[: rows * columns].view(rows, columns), positions)
    if dtype == torch.bfloat16:  # the interpreter cuts off what a GPU rounds
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, expected), (bits, columns, positions, dtype)
    assert (memory[rows * columns :] == 77).all(), (bits, columns, positions, dtype)
"""

ACTIVATIONS = """
from diffusers_bitsfusion.ops.triton import activations as triton_activations
from diffusers_bitsfusion.ops.triton.activations import quantize_image_triton, quantize_tokens_triton
for tokens, columns, size in itertools.product((0, 1, 5), (1, 64, 1000, 1500), (0.0, 1e-3, 1e4)):
    x = torch.randn(tokens, columns) * size
    for dtype in (torch.float32, torch.float16):
        found, expected = quantize_tokens_triton(x.to(dtype)), quantize_tokens_reference(x.to(dtype))
        assert all(map(torch.equal, found, expected)), (tokens, columns, size, dtype)
shapes = ((1, 1, 1, 1), (2, 5, 7, 8), (1, 64, 33, 20), (1, 40, 2, 3))
spreads = ((0, 0, torch.float32), (1e-3, 3, torch.float32), (100, -3, torch.float16), (1, 0.3, torch.float16))
for shape, padding, (size, shift, dtype) in itertools.product(shapes, ((0, 0), (1, 2)), spreads):
    x = ((torch.randn(shape) + shift) * size).to(dtype=dtype, memory_format=torch.channels_last)
    codes, *others = quantize_image_reference(x)
    sides = padding[1], padding[1], padding[0], padding[0]
    expected = torch.nn.functional.pad(codes.int(), sides, value=others[1].item()) - 128
    found, *found_others = quantize_image_triton(x, padding)
    assert all(map(torch.equal, found_others, others)), (shape, padding, size, shift, dtype)
    assert torch.equal(found.int(), expected), (shape, padding, size, shift, dtype)
    assert found.is_contiguous(memory_format=torch.channels_last)
triton_activations._MAX_RANGES = 2  # programs, which then take several blocks each
x = torch.randn(1, 100, 2, 150).to(memory_format=torch.channels_last)
assert torch.equal(quantize_image_triton(x, (0, 0))[0].int() + 128, quantize_image_reference(x)[0].int())
# What is not a number stays visible, and infinity too.
for bad in (float("nan"), float("inf"), -float("inf")):
    x = torch.randn(2, 3, 4, 5)
    x[1, 2, 3, 4] = bad
    assert not quantize_image_triton(x.to(memory_format=torch.channels_last), (0, 0))[1].isfinite()
    assert quantize_tokens_triton(x.view(8, 15))[1].isfinite().tolist() == [True] * 7 + [False]
"""

LINEAR = """
from diffusers_bitsfusion.ops.triton.int8_linear import linear_triton
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

FUSED = """
from diffusers_bitsfusion.ops.decode import decode_reference
from diffusers_bitsfusion.ops.triton.fused_linear import linear_fused
shapes = ((1, 1, 1), (2, 320, 40), (16, 1500, 20), (7, 2600, 16))
for bits, (tokens, columns, outputs) in itertools.product(range(1, 9), shapes):
    half, with_bias = half_range(bits), bits % 2
    codes = torch.randint(-half, half + 1, (outputs, columns), dtype=torch.int8)
    dense, scale = pack_dense(codes, bits), torch.rand(outputs) + 0.01
    bias = torch.randn(outputs).half() if with_bias else None
    x = torch.randn(tokens, columns).half()
    weight = decode_reference(dense, scale, bits, columns, torch.empty(outputs, columns)).double()
    expected = torch.nn.functional.linear(x.double(), weight, bias.double() if with_bias else None)
    found = linear_fused(x, dense, scale, bias, bits)
    assert found.dtype == torch.float16
    size = x.double().norm(dim=1, keepdim=True) * weight.norm(dim=1) + 1
    assert ((found.double() - expected).abs() < 2**-10 * size).all(), (bits, tokens, columns, outputs)
"""

CONV = """
from diffusers_bitsfusion.ops.triton.int8_conv import conv2d_triton
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
    image, image_scale, zero_point = quantize_image_reference(x)
    weight = torch.randint(-127, 128, (outputs * groups, channels, *kernel), dtype=torch.int8)
    weight_scale, bias = torch.rand(outputs * groups), torch.randn(outputs * groups)
    exact = image.double() - zero_point.double()
    sums = torch.nn.functional.conv2d(exact, weight.double(), None, **options)
    expected = sums * image_scale.double() * weight_scale.double()[:, None, None]
    ordered = weight.flatten(2).transpose(1, 2).contiguous()
    sides = options["padding"][1], options["padding"][1], options["padding"][0], options["padding"][0]
    padded = torch.nn.functional.pad(image.int(), sides, value=zero_point.item()) - 128
    padded = padded.to(torch.int8).contiguous(memory_format=torch.channels_last)
    settings = kernel, options["stride"], options["dilation"], groups
    for offset in (bias, None):
        found = conv2d_triton(
            padded, image_scale, zero_point, ordered, weight_scale, offset, *settings, torch.float32
        )
        wanted = expected if offset is None else expected + offset.double()[:, None, None]
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-4)
"""

LAYERS = """
from diffusers_bitsfusion.ops import conv, linear
try:
    conv._multiply_on_gpu(torch.randn(1, 2, 2, 2), torch.ones(3, 9, 2, dtype=torch.int8), torch.ones(3), None,
                          (3, 2, 3, 3), ((2, 2), (0, 0), (1, 1), 1))
except RuntimeError as error:
    assert "Kernel size can't be greater than actual input size" in str(error)
else:
    raise AssertionError("a kernel larger than the image")
scale, bias = torch.rand(6), torch.randn(6)
x, weight = torch.randn(9, 20), torch.randint(-4, 5, (6, 20), dtype=torch.int8)
on_cpu = linear._multiply_on_cpu(x, weight, 3, scale, bias)
torch.testing.assert_close(linear._multiply_on_gpu(x, weight, scale, bias), on_cpu)
plain = torch.randint(-4, 5, (6, 4, 3, 2), dtype=torch.int8)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x, settings = torch.randn(2, 8, 6, 7).to(dtype), ((2, 1), (1, 0), (1, 2), 2)
    on_cpu = torch.ops.onednn.qconv_prepack(plain, scale, 1.0, 1, *settings, None)
    on_gpu = plain.flatten(2).transpose(1, 2).contiguous()
    expected = conv._multiply_by_onednn(x, on_cpu, scale, bias, plain.shape, settings).to(dtype)
    found = conv._multiply_on_gpu(x, on_gpu, scale, bias, plain.shape, settings)
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-4)

# What a layer does where its tensors are on a GPU, on tensors that the interpreter can read.
decoding = importlib.import_module("diffusers_bitsfusion.ops.decode")
shape = 6, 4, 3, 2
packed = pack_dense(torch.randint(-1, 2, (6, 24), dtype=torch.int8), 1), scale
for dtype in (torch.float32, torch.int8):
    expected = decoding.decode_weight(*packed, 1, shape, dtype)
    for has_kernel in (lambda *_: False, lambda *_: True):
        decoding._has_kernel = has_kernel
        found = decoding.decode_channels_last(*packed, 1, shape, dtype)
        assert torch.equal(found, expected) and found.is_contiguous(memory_format=torch.channels_last)
x, settings = torch.randn(2, 8, 6, 7), ((2, 1), (1, 0), (1, 2), 2)
arguments = x, packed[0], scale.view(torch.int32), bias, 1, shape, *settings, False, None
expected = conv.conv2d(*arguments)
conv.wants_channels_last = lambda *_: True
found = conv.conv2d(*arguments)
torch.testing.assert_close(found, expected)
assert found.is_contiguous(memory_format=torch.channels_last)
assert not expected.is_contiguous(memory_format=torch.channels_last)
"""


def test_kernels_equal_the_reference_and_layers_call_them_rightly(run_python):
    code = COMMON + DECODING + ACTIVATIONS + LINEAR + FUSED + CONV + LAYERS
    result = run_python(code, environment={"TRITON_INTERPRET": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
