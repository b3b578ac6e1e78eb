"""`torch.compile(fullgraph=True)` on packed models: one graph, the same outputs and gradients, few recompilations.

Most tests stop before code generation ("aot_eager"): graph capture, shapes and autograd are what this package adds.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_bitsfusion import set_compute
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.nn.conversion import float_from_packed, pack_weight, packed_from_float

pytestmark = pytest.mark.usefixtures("one_thread")

computations = pytest.mark.parametrize(("compute", "resident"), [("exact", "packed"), ("int8", "int8")])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def packed(layer, bits=2, compute="exact", resident="packed"):
    made = packed_from_float(layer, bits, torch.float32)
    pack_weight(made, layer.weight, Rounding())
    made.set_compute(compute, resident)
    return made


@computations
def test_a_unet_is_one_graph_with_the_same_output(packed_unet, call_unet, compute, resident):
    set_compute(packed_unet, compute, resident)
    expected = call_unet(packed_unet)
    backend = CompileCounterWithBackend("aot_eager")
    packed_unet.compile(fullgraph=True, dynamic=False, backend=backend)
    torch.testing.assert_close(call_unet(packed_unet), expected)
    call_unet(packed_unet)
    assert backend.frame_count == 1


def test_compiled_layers_have_the_eager_output_and_gradients():
    """Layers in a row share the scratch that weights are decoded into; kept codes are opaque to the compiler."""
    torch.manual_seed(0)
    model = nn.Sequential(
        packed(nn.Conv2d(3, 6, 3, padding=1, stride=2), 2, "exact"),
        packed(nn.Conv2d(6, 6, 1), 3, "exact"),
        nn.SiLU(),
        packed(nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), 3, "int8"),
        packed(nn.Conv2d(8, 8, 3, padding=1), 1, "int8", "int8"),
        nn.Flatten(2),
        packed(nn.Linear(9, 12), 1, "exact"),
        packed(nn.Linear(12, 6), 4, "int8"),
        packed(nn.Linear(6, 5), 2, "int8", "int8"),
    )
    compiled = torch.compile(model, fullgraph=True, dynamic=False)  # by Inductor, in full
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    x_reference = x.detach().clone().requires_grad_()
    found, expected = compiled(x), model(x_reference)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=1e-4, atol=1e-4)


def test_a_compiled_gradient_by_transforms_is_that_of_the_float_layers():
    torch.manual_seed(0)
    model = nn.Sequential(packed(nn.Conv2d(3, 6, 3)), nn.Flatten(2), packed(nn.Linear(16, 5), compute="int8"))
    dequantized = nn.Sequential(float_from_packed(model[0]), nn.Flatten(2), float_from_packed(model[2]))

    def gradient(model):
        return torch.func.grad(lambda x: model(x).square().sum())

    compiled = torch.compile(gradient(model), fullgraph=True, dynamic=False, backend="aot_eager")
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(compiled(x), gradient(dequantized)(x))


def test_compiled_forward_mode_is_that_of_the_float_layers():
    torch.manual_seed(0)
    model = nn.Sequential(packed(nn.Conv2d(3, 6, 3)), nn.Flatten(2), packed(nn.Linear(16, 5), compute="int8"))
    dequantized = nn.Sequential(float_from_packed(model[0]), nn.Flatten(2), float_from_packed(model[2]))
    x, tangent = torch.randn(2, 2, 3, 6, 6)

    def derivative(model):
        return lambda x, tangent: torch.func.jvp(model, (x,), (tangent,))

    compiled = torch.compile(derivative(model), fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(x, tangent), derivative(dequantized)(x, tangent))


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_dynamic_shapes_compile_once(compute):
    layer = packed(nn.Linear(20, 7), compute=compute)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (2, 3, 11):
        x = torch.randn(tokens, 20)
        torch.testing.assert_close(compiled(x), layer(x))
    assert backend.frame_count == 1


def test_switching_adapters_compiles_once_for_each_state(packed_unet, call_unet):
    """As diffusers does: a new set of active adapters is a new graph, one seen before is not."""
    for name in ("a", "b"):
        config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
        packed_unet.add_adapter(config, adapter_name=name)
    eager = {}
    for name in ("a", "b"):
        packed_unet.set_adapters([name])
        eager[name] = call_unet(packed_unet)
    backend = CompileCounterWithBackend("aot_eager")
    packed_unet.compile(fullgraph=True, dynamic=False, backend=backend)
    for name in ("a", "b", "a", "b"):
        packed_unet.set_adapters([name])
        torch.testing.assert_close(call_unet(packed_unet), eager[name])
    assert backend.frame_count == 2


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_operators_keep_torchs_rules(compute):
    """Schema, fake tensors, autograd registration and tracing, by torch's own checker."""
    linear = packed(nn.Linear(12, 5), compute=compute)
    conv = packed(nn.Conv2d(4, 6, 3), compute=compute)
    x, image = torch.randn(3, 12, requires_grad=True), torch.randn(2, 4, 6, 6, requires_grad=True)
    shared = (linear.codes, linear.scale_bits, linear.bias, linear.bits, linear.weight_shape)
    torch.library.opcheck(torch.ops.bitsfusion.linear.default, (x, *shared, linear.computes_int8, None))
    shared = (conv.codes, conv.scale_bits, conv.bias, conv.bits, conv.weight_shape, (1, 1), (0, 0), (1, 1), 1)
    torch.library.opcheck(torch.ops.bitsfusion.conv2d.default, (image, *shared, conv.computes_int8, None))
    shared = (conv.codes, conv.scale_bits, conv.bits, conv.weight_shape, torch.bfloat16)
    torch.library.opcheck(torch.ops.bitsfusion.weight.default, shared)
