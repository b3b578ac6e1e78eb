import copy

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusers_bitsfusion import BitsFusionLinear
from diffusers_bitsfusion.codec.radix import unpack_dense
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.nn.conversion import float_from_packed, pack_weight, packed_from_float

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def packed_and_float(inputs, outputs, bits=2, bias=True, dtype=torch.float32, seed=0):
    """A packed layer and the ordinary one on `scale * code`."""
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    packed = packed_from_float(layer, bits, dtype)
    pack_weight(packed, layer.weight, Rounding())
    reference = copy.deepcopy(layer)
    codes = unpack_dense(packed.codes, bits, inputs)
    reference.weight.data = (codes * packed.scale.view(torch.float32)).to(dtype)
    return packed, reference


def close(found, expected, factor=1.0):
    assert found.dtype == expected.dtype
    tolerance = factor * TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_output_is_that_of_the_dequantized_layer(bits, bias, dtype):
    packed, reference = packed_and_float(37, 11, bits, bias, dtype)
    x = torch.randn(3, 5, 37, dtype=dtype)
    close(packed(x), reference(x))


@given(
    inputs=st.integers(1, 90),
    outputs=st.integers(1, 40),
    bits=st.integers(1, 8),
    batch=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=50)
def test_outputs_and_gradients_are_those_of_the_dequantized_layer(inputs, outputs, bits, batch, bias, seed):
    packed, reference = packed_and_float(inputs, outputs, bits, bias, seed=seed)
    x = torch.randn(*batch, inputs, requires_grad=True)
    x_reference = x.detach().clone().requires_grad_()
    found, expected = packed(x), reference(x_reference)
    close(found, expected)
    grad = torch.randn_like(expected)
    found.backward(grad)
    packed_bias_grad = packed.bias.grad.clone() if bias else None
    expected.backward(grad)
    close(x.grad, x_reference.grad)
    if bias:
        close(packed_bias_grad, reference.bias.grad)


def test_a_single_vector_has_output_and_gradients():
    packed, reference = packed_and_float(8, 4)
    x = torch.randn(8, requires_grad=True)
    found = packed(x)
    close(found, reference(x))
    found.sum().backward()
    close(x.grad, reference.weight.sum(0))
    assert torch.equal(packed.bias.grad, torch.ones(4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_in_every_dtype(dtype):
    packed, reference = packed_and_float(48, 24, dtype=dtype)
    x = torch.randn(6, 48, dtype=dtype, requires_grad=True)
    x_reference = x.detach().clone().requires_grad_()
    packed(x).square().sum().backward()
    reference(x_reference).square().sum().backward()
    close(x.grad, x_reference.grad, factor=8)
    close(packed.bias.grad, reference.bias.grad, factor=8)


def test_no_gradient_reaches_codes_or_scale():
    packed, _ = packed_and_float(8, 4)
    packed(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert packed.codes.grad is None and packed.scale.grad is None


def test_the_bias_learns_when_the_input_needs_no_gradient():
    packed, _ = packed_and_float(8, 4)
    packed(torch.randn(3, 8)).sum().backward()
    assert torch.equal(packed.bias.grad, torch.full((4,), 3.0))


def test_the_input_learns_when_the_bias_is_frozen():
    packed, reference = packed_and_float(8, 4)
    packed.bias.requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    packed(x).sum().backward()
    close(x.grad, reference.weight.sum(0).expand(3, 8))
    assert packed.bias.grad is None


def test_a_frozen_layer_on_a_plain_input_leaves_no_graph():
    packed, _ = packed_and_float(8, 4)
    packed.bias.requires_grad_(False)
    assert not packed(torch.randn(3, 8)).requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_the_output_is_the_same(mode):
    packed, reference = packed_and_float(8, 4)
    x = torch.randn(3, 8, requires_grad=True)
    with mode():
        found = packed(x)
    assert not found.requires_grad
    close(found, reference(x).detach())


def test_the_gradient_through_two_layers_is_right_though_they_share_a_scratch():
    first, first_float = packed_and_float(12, 20, bits=2, seed=1)
    second, second_float = packed_and_float(20, 6, bits=3, seed=2)
    x = torch.randn(4, 12, requires_grad=True)
    x_reference = x.detach().clone().requires_grad_()
    second(first(x).relu()).square().sum().backward()
    second_float(first_float(x_reference).relu()).square().sum().backward()
    close(x.grad, x_reference.grad, factor=10)


def test_a_checkpointed_layer_has_the_same_gradient():
    packed, reference = packed_and_float(12, 20)
    x = torch.randn(4, 12, requires_grad=True)
    torch.utils.checkpoint.checkpoint(packed, x, use_reentrant=False).sum().backward()
    close(x.grad, reference.weight.sum(0).expand(4, 12))


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_computes_in_its_own_dtype(grad):
    packed, reference = packed_and_float(33, 9)
    x = torch.randn(4, 33, requires_grad=grad)
    x_reference = x.detach().clone().requires_grad_(grad)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = packed(x), reference(x_reference)
    assert found.dtype == torch.bfloat16
    close(found, expected)
    if grad:
        found.float().sum().backward()
        expected.float().sum().backward()
        assert x.grad.dtype == torch.float32
        torch.testing.assert_close(x.grad, x_reference.grad, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_double_precision_alone_as_torch_does():
    packed, reference = packed_and_float(33, 9)
    x = torch.randn(4, 33, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == reference.double()(x).dtype == torch.float64


def test_the_output_follows_the_dtype_of_the_input():
    packed, _ = packed_and_float(16, 4, dtype=torch.float32)
    for dtype in DTYPES:
        assert packed(torch.randn(2, 16, dtype=dtype)).dtype == dtype


def test_an_input_of_the_wrong_width_is_refused():
    packed, _ = packed_and_float(16, 4)
    with pytest.raises(RuntimeError):
        packed(torch.randn(2, 15))


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_the_dequantized_layer_is_an_ordinary_one_on_the_same_weight(bits):
    packed, reference = packed_and_float(31, 7, bits)
    dequantized = float_from_packed(packed)
    assert type(dequantized) is nn.Linear
    assert set(dequantized.state_dict()) == {"weight", "bias"}
    assert torch.equal(dequantized.weight, reference.weight)
    assert dequantized.weight.requires_grad
    assert set(dequantized.__dict__) == set(nn.Linear(31, 7).__dict__)
    assert repr(dequantized) == repr(nn.Linear(31, 7))


def test_the_representation_tells_sizes_and_bits():
    packed, _ = packed_and_float(31, 7, bits=3)
    assert isinstance(packed, BitsFusionLinear)
    assert repr(packed) == "BitsFusionLinear(in_features=31, out_features=7, bias=True, bits=3)"
