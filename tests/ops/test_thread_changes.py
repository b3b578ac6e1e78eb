"""Integer convolutions while the number of threads changes, on which oneDNN's layout of weights depends.

Each test runs in a process of its own, which a write past a buffer may end.
"""

from __future__ import annotations

import pytest
import torch

from diffusers_bitsfusion.ops.dispatch import why_no_int8

pytestmark = pytest.mark.skipif(why_no_int8(torch.device("cpu")) is not None, reason="integers need oneDNN on x86")

COMMON = """
import itertools, threading
import torch
import torch._dynamo
from torch import nn
from diffusers_bitsfusion.codec.radix import unpack_dense
from diffusers_bitsfusion.codec.quantize_dense import quantize_to_dense
from diffusers_bitsfusion.nn.conv import BitsFusionConv2d
from diffusers_bitsfusion.ops.activations import quantize_image_reference

torch.cpu._is_vnni_supported = lambda: True  # Without VNNI convolutions are loops that have no such layout.

# Outputs, inputs, kernel, stride, groups: blocks of every width, and the ends of blocks.
SHAPES = [
    (80, 96, 3, 1, 1), (96, 80, 3, 1, 1), (64, 64, 3, 1, 1), (40, 24, 3, 2, 1), (48, 48, 1, 1, 1), (33, 5, 1, 1, 1),
    (128, 4, 3, 1, 1), (4, 64, 3, 1, 1), (100, 100, 3, 1, 1), (16, 16, 3, 1, 1), (320, 36, 1, 1, 1), (31, 64, 3, 2, 1),
    (12, 12, 3, 1, 4), (112, 17, 3, 1, 1), (160, 48, 1, 2, 1), (65, 65, 3, 1, 1),
]

def packed(shape, seed=0):
    outputs, inputs, kernel, stride, groups = shape
    torch.manual_seed(seed)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
    made = BitsFusionConv2d.from_float(layer, 2, torch.float32)
    made.set_codes(*quantize_to_dense(layer.weight.detach().flatten(1), 2))
    return made.requires_grad_(False)

def reference(layer, x):
    # The same integers in fp64, by torch's plain convolution.
    image, scale, zero = quantize_image_reference(x)
    codes = unpack_dense(layer.codes, layer.bits, layer.columns).view(layer.weight_shape).double()
    sums = nn.functional.conv2d(image.double() - zero, codes, None, layer.stride, layer.padding, 1, layer.groups)
    scales = scale.double() * layer.scale.view(torch.float32).double()
    return sums * scales.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)

def check(layer, x, what):
    y = layer(x).double()
    error = float((y - reference(layer, x)).norm() / y.norm())
    assert error < 1e-5, f"{what}: relative error {error:.2g}"
"""


def succeed(process):
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.endswith("done\n")


def test_every_layer_is_right_at_every_number_of_threads(run_python):
    succeed(
        run_python(
            COMMON
            + """
inputs = {shape: torch.randn(2, shape[1], 9, 9) for shape in SHAPES}
kept = []
for turn, threads in enumerate((2, 3, 1, 12, 64, 12, 1, 3, 2)):
    torch.set_num_threads(threads)
    # Layers are dropped after their second turn, so that layouts are found anew, copied, and written over.
    kept = [entry for entry in kept if entry[0] >= turn - 1]
    for shape in SHAPES:
        unkept = packed(shape)
        unkept.set_compute("int8", "packed")
        check(unkept, inputs[shape], f"{shape} decoded in each call at {threads} threads")
        for seed in range(3 if turn else 0):
            layer = packed(shape, seed)
            layer.set_compute("int8", "int8")
            kept.append((turn, threads, shape, layer))
    for _, laid_out, shape, layer in kept:
        check(layer, inputs[shape], f"{shape} laid out at {laid_out} threads and used at {threads}")
print("done")
"""
        )
    )


def test_threads_that_compute_with_other_settings_do_not_mix(run_python):
    succeed(
        run_python(
            COMMON
            + """
failures = []

def work(threads):
    try:
        torch.set_num_threads(threads)
        for turn, shape in itertools.product(range(4), SHAPES[:8]):
            x = torch.randn(1, shape[1], 7, 7)
            layer = packed(shape, turn)
            for resident in ("packed", "int8"):
                layer.set_compute("int8", resident)
                check(layer, x, f"{shape} in a thread of {threads}")
            check(shared[shape], x, f"{shape} shared, in a thread of {threads}")
    except BaseException as error:
        failures.append(error)

torch.set_num_threads(2)
shared = {shape: packed(shape) for shape in SHAPES[:8]}
for layer in shared.values():
    layer.set_compute("int8", "int8")
workers = [threading.Thread(target=work, args=(threads,)) for threads in (1, 3, 12)]
for worker in workers: worker.start()
for worker in workers: worker.join()
if failures: raise failures[0]
print("done")
"""
        )
    )


def test_a_compiled_layer_follows_the_number_of_threads(run_python):
    succeed(
        run_python(
            COMMON
            + """
torch._dynamo.config.recompile_limit = 64
torch.set_num_threads(2)
layers = [packed(shape) for shape in SHAPES[:6]]
for layer in layers:
    layer.set_compute("int8", "int8")
compiled = [torch.compile(layer, backend="aot_eager", fullgraph=True) for layer in layers]
for threads in (2, 3, 64, 1, 2):
    torch.set_num_threads(threads)
    for shape, layer, call in zip(SHAPES, layers, compiled):
        x = torch.randn(1, shape[1], 8, 8)
        check(layer, x, f"{shape} at {threads} threads")
        assert torch.equal(call(x), layer(x))
print("done")
"""
        )
    )
