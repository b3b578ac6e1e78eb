import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from diffusers_bitsfusion.codec.grid import code_range
from diffusers_bitsfusion.codec.quantize_dense import quantize_to_dense
from diffusers_bitsfusion.codec.radix import unpack_dense
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.nn.fake_quantized import fake_quantized_from_float, straight_through

pytestmark = pytest.mark.usefixtures("one_thread")


class _Round(torch.autograd.Function):
    """round() with gradient 1: the straight-through estimator in its textbook form."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def textbook_rounding(weight, scale, bits, balance):
    """LSQ composed of plain operations, which autograd differentiates: Q(w) = round(clip(w / s)) * s, and the scale's
    gradient times 1 / sqrt(N Q)."""
    low, high = code_range(bits, balance)
    factor = 1 / (weight[0].numel() * max(-low, high)) ** 0.5
    scale = (scale * factor + (scale * (1 - factor)).detach()).view(-1, *(1 for _ in weight.shape[1:]))
    # The estimator passes where rounding does not clip: half a step beyond the last level.
    ratio = weight / scale
    rounded = _Round.apply(ratio)
    return (
        torch.where((rounded.detach() < low) | (rounded.detach() > high), rounded.detach().clamp(low, high), rounded)
        * scale
    )


def disturbed(layer, seed=0):
    """Scales off their optimum, so that weights are clipped and rounded in every way."""
    generator = torch.Generator().manual_seed(seed)
    layer.scale.data *= 0.4 + torch.rand(layer.scale.shape, generator=generator)
    return layer


def gradients(output, tensors):
    return torch.autograd.grad(output.square().sum(), tensors)


@given(
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 30),
    bits=st.integers(1, 8),
    balance=st.booleans(),
    bias=st.booleans(),
    batch=st.lists(st.integers(0, 4), min_size=1, max_size=2),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_linear_equals_textbook_lsq(inputs, outputs, bits, balance, bias, batch, seed):
    torch.manual_seed(seed)
    layer = disturbed(
        fake_quantized_from_float(nn.Linear(inputs, outputs, bias=bias), bits, Rounding(balance=balance)), seed
    )
    x = torch.randn(*batch, inputs, requires_grad=True)
    tensors = [x, layer.weight, layer.scale, *([layer.bias] if bias else [])]
    expected = F.linear(x, textbook_rounding(layer.weight, layer.scale, bits, balance), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(gradients(layer(x), tensors), gradients(expected, tensors), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@given(
    groups=st.sampled_from([1, 2, 3]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, (1, 2), "same"]),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    bits=st.integers(1, 8),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_conv_equals_textbook_lsq(groups, kernel, stride, dilation, padding, mode, bits, bias, seed):
    torch.manual_seed(seed)
    stride = 1 if padding == "same" else stride
    plain = nn.Conv2d(6, 6, kernel, stride, padding, dilation, groups=groups, bias=bias, padding_mode=mode)
    layer = disturbed(fake_quantized_from_float(plain, bits), seed)
    x = torch.randn(2, 6, 9, 8, requires_grad=True)
    tensors = [x, layer.weight, layer.scale, *([layer.bias] if bias else [])]
    expected = layer._conv_forward(x, textbook_rounding(layer.weight, layer.scale, bits, True), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(layer(x), tensors), gradients(expected, tensors), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer(x[0]), layer(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_forward_mode_is_the_transpose_of_the_backward_pass(kind):
    torch.manual_seed(0)
    plain, shape = (nn.Linear(6, 5), (3, 6)) if kind == "linear" else (nn.Conv2d(4, 6, 3, 2, 1, 1, 2), (2, 4, 7, 7))
    layer = disturbed(fake_quantized_from_float(plain, 2))
    inputs = {"x": torch.randn(shape), **{name: value.detach() for name, value in layer.named_parameters()}}
    tangents = {name: torch.randn_like(value) for name, value in inputs.items()}

    def call(values):
        return torch.func.functional_call(layer, {n: v for n, v in values.items() if n != "x"}, (values["x"],))

    output, pull = torch.func.vjp(call, inputs)
    gradient = torch.randn_like(output)
    pulled = pull(gradient)[0]
    for names in (inputs, ["x"], ["weight"], ["scale"], ["bias"]):
        primals = {name: inputs[name] for name in names}
        some = {name: tangents[name] for name in names}
        tangent = torch.func.jvp(lambda values: call(inputs | values), (primals,), (some,))[1]
        expected = sum((pulled[name] * some[name]).sum() for name in names)
        torch.testing.assert_close((tangent * gradient).sum(), expected, rtol=1e-4, atol=1e-4)


def test_the_estimator_by_hand():
    # Ternary, scale 2: 5 is clipped to 2, -1.2 rounds to -2, 0.5 to 0, 2.6 to 2 without being clipped.
    weight, grad = torch.tensor([[5.0, -1.2, 0.5, 2.6]]), torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    grad_weight, grad_scale = straight_through(grad.clone(), weight, torch.tensor([2.0]), bits=1)
    assert grad_weight.tolist() == [[0.0, 10.0, 100.0, 1000.0]]
    slopes = np.array([1, -1 + 0.6, 0 - 0.25, 1 - 1.3])
    assert grad_scale.item() == pytest.approx(float(slopes @ grad[0].numpy()) / np.sqrt(4 * 1), rel=1e-6)


@pytest.mark.parametrize("init", ["alternating", "minmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", range(1, 9))
def test_it_starts_as_post_training_quantization_rounds(bits, dtype, init):
    torch.manual_seed(bits)
    plain = nn.Linear(75, 20).to(dtype)
    before = copy.deepcopy(plain.state_dict())
    layer = fake_quantized_from_float(plain, bits, Rounding(scale_init=init))
    dense, scale = quantize_to_dense(plain.weight.detach(), bits, Rounding(scale_init=init))
    codes, own_scale = layer.codes_and_scale()
    assert torch.equal(codes, unpack_dense(dense, bits, 75).float()) and torch.equal(own_scale, scale)
    assert layer.weight.dtype == layer.scale.dtype == torch.float32
    layer.weight.data.zero_()
    layer.bias.data.zero_()
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())


def test_a_scale_that_crossed_zero_comes_back():
    layer = fake_quantized_from_float(nn.Linear(32, 4), 2)
    target = layer(torch.eye(32)).detach()
    layer.scale.data.fill_(-0.01)
    optimizer = torch.optim.SGD([layer.scale], lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        (layer(torch.eye(32)) - target).square().sum().backward()
        optimizer.step()
    assert (layer.scale > 0.01).all()
    assert torch.isfinite(layer(torch.eye(32))).all()


@pytest.mark.parametrize("kind", [nn.Linear(12, 8), nn.Conv2d(12, 8, 3, padding=1)], ids=["linear", "conv"])
def test_under_autocast_products_are_bf16_and_gradients_fp32(kind):
    layer = fake_quantized_from_float(kind, 2)
    x = torch.randn(2, 12, 6, 12) if isinstance(kind, nn.Conv2d) else torch.randn(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), rtol=3e-2, atol=3e-2)
    output.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.Linear(12, 8), nn.Conv2d(12, 8, 3, padding=1)], ids=["linear", "conv"])
def test_a_layer_that_was_cast_rounds_in_fp32(kind, dtype):
    layer = disturbed(fake_quantized_from_float(kind, 2)).to(dtype)
    x = torch.randn(2, 12, 6, 12, dtype=dtype) if isinstance(kind, nn.Conv2d) else torch.randn(2, 12, dtype=dtype)
    weight, scale = (tensor.detach().float().requires_grad_() for tensor in (layer.weight, layer.scale))
    rounded = textbook_rounding(weight, scale, 2, True)
    output, expected = layer(x), F.linear(x, rounded.to(dtype), layer.bias) if x.dim() == 2 else None
    if expected is None:
        expected = layer._conv_forward(x, rounded.to(dtype), layer.bias)
    assert torch.equal(output, expected)
    found = torch.autograd.grad(output.float().sum(), [layer.weight, layer.scale])
    for gradient, reference in zip(found, torch.autograd.grad(expected.float().sum(), [weight, scale]), strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.float(), reference, rtol=2e-2, atol=2e-2)
    codes, exact = layer.codes_and_scale()
    torch.testing.assert_close(codes * exact.unsqueeze(1), rounded.detach().flatten(1))


def test_the_rounded_weight_is_not_kept_for_the_backward_pass():
    layer = fake_quantized_from_float(nn.Linear(64, 64), 2)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.randn(3, 64)
        layer(x)
    own = {x.data_ptr(), layer.weight.data_ptr(), layer.scale.data_ptr()}
    assert {tensor.data_ptr() for tensor in kept} <= own


def test_state_dict_round_trip():
    layer = disturbed(fake_quantized_from_float(nn.Conv2d(3, 5, 3), 2))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    torch.manual_seed(1)
    other = fake_quantized_from_float(nn.Conv2d(3, 5, 3), 2)
    other.load_state_dict(torch.load(buffer))
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(other(x), layer(x))


def test_a_lora_is_trained_on_a_layer_in_training():
    torch.manual_seed(0)
    model = nn.Sequential(fake_quantized_from_float(nn.Linear(6, 4), 2))
    x = torch.randn(3, 6)
    before = model(x)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    lora = adapted.base_model.model[0]
    delta = lora.lora_B["default"].weight @ lora.lora_A["default"].weight * lora.scaling["default"]
    after = adapted(x)
    assert torch.allclose(after, before + x @ delta.T, atol=1e-6) and not torch.allclose(after, before)
    after.sum().backward()
    assert all(parameter.grad is not None for name, parameter in adapted.named_parameters() if "lora_" in name)


def test_weights_that_are_not_finite_are_refused():
    plain = nn.Linear(4, 4)
    plain.weight.data[2, 1] = torch.nan
    with pytest.raises(ValueError, match="output channel 2 holds NaN"):
        fake_quantized_from_float(plain, 2)
