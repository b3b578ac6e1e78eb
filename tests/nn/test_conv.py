import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusers_bitsfusion.codec.radix import unpack_dense
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.nn.conversion import float_from_packed, pack_weight, packed_from_float

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def packed_and_float(*sizes, bits=2, dtype=torch.float32, seed=0, **options):
    """A packed convolution and the ordinary one on `scale * code`."""
    torch.manual_seed(seed)
    layer = nn.Conv2d(*sizes, **options).to(dtype)
    packed = packed_from_float(layer, bits, dtype)
    pack_weight(packed, layer.weight, Rounding())
    reference = copy.deepcopy(layer)
    codes = unpack_dense(packed.codes, bits, layer.weight[0].numel())
    weight = codes * packed.scale.view(torch.float32)
    reference.weight.data = weight.view(layer.weight.shape).to(dtype)
    return packed, reference


def close(found, expected, factor=1.0):
    assert found.dtype == expected.dtype
    tolerance = factor * TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def assert_same_layer(packed, reference, x):
    """Same output, same gradients of input and bias."""
    x = x.clone().requires_grad_()
    x_reference = x.detach().clone().requires_grad_()
    found, expected = packed(x), reference(x_reference)
    close(found, expected)
    with torch.no_grad():
        close(packed(x), expected)
    grad = torch.randn_like(expected)
    found.backward(grad)
    expected.backward(grad)
    close(x.grad, x_reference.grad)
    if reference.bias is not None:
        close(packed.bias.grad, reference.bias.grad, factor=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_output_is_that_of_the_dequantized_layer(bits, dtype):
    packed, reference = packed_and_float(5, 7, 3, padding=1, bits=bits, dtype=dtype)
    x = torch.randn(2, 5, 9, 8, dtype=dtype)
    close(packed(x), reference(x))


OPTIONS = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"stride": (1, 3), "padding": (2, 0)},
    {"dilation": 2, "padding": 2},
    {"groups": 2},
    {"groups": 6, "padding": 1},
    {"padding": "same"},
    {"padding": "valid"},
    {"padding": "same", "dilation": (1, 3)},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "replicate", "stride": 2},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "circular", "groups": 3},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kernel", [3, (2, 4)], ids=str)
def test_every_setting_gives_the_output_and_gradients_of_the_float_layer(options, kernel):
    packed, reference = packed_and_float(6, 12, kernel, **options)
    assert_same_layer(packed, reference, torch.randn(2, 6, 10, 11))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2}, {"padding": "same", "padding_mode": "reflect"}])
def test_gradients_in_half_precision(dtype, options):
    packed, reference = packed_and_float(4, 6, 3, dtype=dtype, **options)
    assert_same_layer(packed, reference, torch.randn(2, 4, 6, 6, dtype=dtype))


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_every_batch_size_works(batch):
    packed, reference = packed_and_float(3, 5, 3, padding=1)
    assert_same_layer(packed, reference, torch.randn(batch, 3, 6, 6))


def test_an_image_without_a_batch_works():
    packed, reference = packed_and_float(3, 5, 3, padding=1)
    assert_same_layer(packed, reference, torch.randn(3, 6, 6))


def test_channels_last_input_works():
    packed, reference = packed_and_float(3, 5, 3, padding=1)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert_same_layer(packed, reference, x)


@given(
    channels=st.integers(1, 7),
    outputs=st.integers(1, 7),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 3),
    bits=st.integers(1, 8),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_any_convolution_equals_the_float_one(
    channels, outputs, kernel, stride, padding, dilation, groups, bits, mode, bias
):
    packed, reference = packed_and_float(
        channels * groups,
        outputs * groups,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
        bias=bias,
        bits=bits,
    )
    assert_same_layer(packed, reference, torch.randn(2, channels * groups, 8, 9))


def test_no_gradient_reaches_codes_or_scale():
    packed, _ = packed_and_float(3, 4, 3)
    packed(torch.randn(1, 3, 5, 5, requires_grad=True)).sum().backward()
    assert packed.codes.grad is None and packed.scale.grad is None


def test_the_bias_learns_when_the_input_needs_no_gradient():
    packed, _ = packed_and_float(3, 4, 3, padding=1)
    packed(torch.randn(2, 3, 5, 5)).sum().backward()
    assert torch.equal(packed.bias.grad, torch.full((4,), 2.0 * 25))


def test_the_gradient_through_two_layers_is_right_though_they_share_a_scratch():
    first, first_float = packed_and_float(3, 8, 3, padding=1, seed=1)
    second, second_float = packed_and_float(8, 4, 3, bits=4, seed=2)
    x = torch.randn(2, 3, 7, 7, requires_grad=True)
    x_reference = x.detach().clone().requires_grad_()
    second(first(x).relu()).square().sum().backward()
    second_float(first_float(x_reference).relu()).square().sum().backward()
    close(x.grad, x_reference.grad, factor=5)


@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 1, "padding_mode": "reflect"}])
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_computes_in_its_own_dtype(options, grad):
    packed, reference = packed_and_float(6, 5, 3, **options)
    x = torch.randn(2, 6, 7, 7, requires_grad=grad)
    x_reference = x.detach().clone().requires_grad_(grad)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = packed(x), reference(x_reference)
    assert found.dtype == torch.bfloat16
    close(found, expected)
    if grad:
        found.float().sum().backward()
        expected.float().sum().backward()
        assert x.grad.dtype == torch.float32
        torch.testing.assert_close(x.grad, x_reference.grad, rtol=3e-2, atol=3e-2)


def test_an_input_of_the_wrong_channels_is_refused():
    packed, _ = packed_and_float(3, 4, 3)
    with pytest.raises(RuntimeError):
        packed(torch.randn(1, 4, 5, 5))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_dequantized_layer_is_an_ordinary_one_with_the_same_output(options):
    packed, reference = packed_and_float(6, 12, 3, **options)
    dequantized = float_from_packed(packed)
    assert type(dequantized) is nn.Conv2d
    assert repr(dequantized) == repr(reference)
    assert set(dequantized.__dict__) == set(reference.__dict__)
    x = torch.randn(1, 6, 10, 10)
    assert torch.equal(dequantized.weight, reference.weight)
    close(dequantized(x), reference(x))
