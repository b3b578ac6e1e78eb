"""Packed layers: what they hold, how they are called, copied and differentiated."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny import tiny_controlnet, tiny_unet
from torch import nn
from torch.autograd import forward_ad

from diffusers_bitsfusion import BitsFusionConfig, BitsFusionConv2d, BitsFusionLinear, quantize_model
from diffusers_bitsfusion.codec.radix import dense_width, unpack_dense
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.codec.schema import branch_shapes
from diffusers_bitsfusion.nn import PackedWeight, QATConv2d, QATLinear, conv
from diffusers_bitsfusion.nn.conversion import float_from_packed, pack_weight, packed_from_float, replace_module
from diffusers_bitsfusion.nn.fake_quantized import fake_quantized_from_float

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT_LAYERS = [(BitsFusionLinear, nn.Linear, (10, 6)), (BitsFusionConv2d, nn.Conv2d, (4, 6, 3))]

every_kind = pytest.mark.parametrize(("kind", "base", "sizes"), FLOAT_LAYERS)


def packed_layer(base, sizes, bits=2, dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = base(*sizes, **options)
    packed = packed_from_float(layer, bits, dtype)
    return pack_weight(packed, layer.weight, Rounding())


def example_input(base):
    return torch.randn(2, 10) if base is nn.Linear else torch.randn(2, 4, 7, 7)


@every_kind
def test_the_packed_layer_is_still_the_layer_that_others_look_for(kind, base, sizes):
    layer = packed_layer(base, sizes)
    assert type(layer) is kind
    assert isinstance(layer, base) and isinstance(layer, PackedWeight)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_reading_the_weight_decodes_it(kind, base, sizes, dtype, bits):
    layer = packed_layer(base, sizes, bits, dtype)
    shape = base(*sizes).weight.shape
    codes = unpack_dense(layer.codes, bits, shape[1:].numel())
    expected = (codes * layer.scale.view(torch.float32)).view(shape).to(dtype)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, expected)


@every_kind
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_and_state_hold_codes_and_scale_but_no_weight(kind, base, sizes, bias, decodes):
    layer = packed_layer(base, sizes, bias=bias)
    names = {"codes", "scale"} | ({"bias"} if bias else set())
    assert set(layer.state_dict()) == names
    assert {name for name, _ in layer.named_parameters()} == names
    assert not list(layer.buffers())
    assert decodes == {"read": 0, "call": 0}


@every_kind
def test_codes_and_scale_are_integers_that_need_no_gradient(kind, base, sizes):
    layer = packed_layer(base, sizes, bits=2)
    columns = base(*sizes).weight[0].numel()
    assert layer.codes.dtype == torch.uint8 and layer.codes.shape == (6, dense_width(columns, 2))
    assert layer.scale.dtype == torch.int32 and layer.scale.shape == (6, 1)
    assert not layer.codes.requires_grad and not layer.scale.requires_grad


@every_kind
def test_the_scale_is_kept_to_the_last_bit_through_casts(kind, base, sizes):
    layer = packed_layer(base, sizes)
    weight, codes, scale = layer.weight, layer.codes.clone(), layer.scale.clone()
    layer.half().float().bfloat16().to(torch.float64)
    assert torch.equal(layer.codes, codes) and torch.equal(layer.scale, scale)
    assert layer.weight.dtype == layer.bias.dtype == torch.float64
    assert torch.equal(layer.float().weight, weight)


@every_kind
def test_the_weight_follows_casts_as_a_parameter_would(kind, base, sizes):
    layer, x = packed_layer(base, sizes).bfloat16(), example_input(base).bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(float_from_packed(layer)(x), layer(x))
    layer.to(torch.float8_e4m3fn)  # Layerwise casting stores in such dtypes, in which nothing computes.
    assert layer.weight.dtype == torch.bfloat16
    codes = layer.codes.clone()
    with pytest.raises(TypeError, match=f"{kind.__name__} holds codes, which no cast may change"):
        layer.type(torch.float16)
    assert torch.equal(layer.codes, codes)


@every_kind
def test_a_replica_for_another_device_has_its_weight(kind, base, sizes):
    layer = packed_layer(base, sizes)
    replica = layer._replicate_for_data_parallel()
    for name in ("codes", "scale", "bias"):  # as `torch.nn.parallel.replicate`, which needs GPUs
        setattr(replica, name, layer.get_parameter(name).detach())
    replica._parameters |= {"branch_down": None, "branch_up": None}
    assert torch.equal(replica.weight, layer.weight)
    assert torch.equal(replica(example_input(base) * 0), layer(example_input(base) * 0))


@every_kind
def test_asking_for_gradients_of_the_codes_raises(kind, base, sizes):
    with pytest.raises(RuntimeError, match="floating point"):
        packed_layer(base, sizes).requires_grad_(True)


@pytest.mark.parametrize(
    ("kind", "sizes", "instead"),
    [
        (BitsFusionLinear, (10, 6), "quantize_model"),
        (BitsFusionConv2d, (4, 6, 3), "quantize_model"),
        (QATLinear, (10, 6), "prepare_qat"),
        (QATConv2d, (4, 6, 3), "prepare_qat"),
    ],
)
def test_constructing_a_layer_directly_is_refused(kind, sizes, instead):
    with pytest.raises(TypeError, match=rf"{kind.__name__} has no constructor.*{instead}.*{kind.__name__}.from_float"):
        kind(*sizes)


GEOMETRIES = [
    nn.Linear(7, 5, bias=False),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, padding_mode="circular"),
    nn.Conv2d(4, 6, 3, padding="same", bias=False),
]


@pytest.mark.parametrize("layer", GEOMETRIES, ids=str)
def test_the_geometry_is_copied_and_nothing_else(layer):
    layer = copy.deepcopy(layer)
    layer.note = "of somebody else"
    layer.register_forward_hook(lambda *_: None)
    for converted in (packed_from_float(layer, 2, torch.float32), fake_quantized_from_float(layer, 2)):
        assert repr(converted).replace(type(converted).__name__, type(layer).__name__).replace(", bits=2", "") == repr(
            layer
        )
        assert not hasattr(converted, "note") and not converted._forward_hooks


@every_kind
def test_an_attribute_that_does_not_exist_is_an_attribute_error(kind, base, sizes):
    with pytest.raises(AttributeError, match="no_such_thing"):
        packed_layer(base, sizes).no_such_thing  # noqa: B018


@every_kind
@pytest.mark.parametrize("grad", [False, True])
def test_a_call_decodes_once_and_never_reads_the_weight(kind, base, sizes, grad, decodes):
    layer = packed_layer(base, sizes)
    x = example_input(base).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y = layer(x)
    assert decodes == {"read": 0, "call": 1}
    if grad:
        y.sum().backward()
        assert decodes == {"read": 0, "call": 2}


@pytest.mark.parametrize("model", ["unet", "controlnet"])
def test_a_whole_model_decodes_each_layer_once_a_call(model, decodes):
    net = tiny_unet() if model == "unet" else tiny_controlnet()
    quantize_model(net, BitsFusionConfig(recipe=2, time_embedding="keep"), progress=False)
    called = []
    for module in net.modules():
        if isinstance(module, PackedWeight):
            module.register_forward_hook(lambda *_: called.append(1))
    image, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    extra = {} if model == "unet" else {"controlnet_cond": torch.randn(1, 3, 16, 16), "return_dict": False}
    decodes.update(read=0, call=0)
    with torch.no_grad():
        net(image, torch.tensor(5), encoder_hidden_states=text, **extra)
    assert len(called) > 20
    assert decodes == {"read": 0, "call": len(called)}


@every_kind
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same_and_shares_nothing(kind, base, sizes, copier):
    layer = packed_layer(base, sizes)
    copied = copier(layer)
    x = example_input(base)
    expected = layer(x)
    assert type(copied) is kind
    assert torch.equal(copied(x), expected)
    assert copied.codes.data_ptr() != layer.codes.data_ptr()
    layer.codes.data.zero_()
    assert torch.equal(copied(x), expected)


@every_kind
def test_the_state_dict_carries_the_layer_to_another(kind, base, sizes):
    layer, other = packed_layer(base, sizes), packed_layer(base, sizes)
    other.codes.data.zero_()
    other.scale.data.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)


@every_kind
def test_a_packed_layer_waits_for_its_codes_on_the_meta_device_with_the_bias_of_its_source(kind, base, sizes):
    layer = base(*sizes)
    packed = packed_from_float(layer, 3, torch.float16)
    assert packed.codes.is_meta and packed.scale.is_meta
    assert packed.bias is layer.bias
    assert packed.weight_shape == tuple(layer.weight.shape)


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_a_replaced_layer_keeps_its_place_and_mode(kind, base, sizes, training):
    model = nn.Sequential(nn.Identity(), nn.Sequential(base(*sizes))).train(training)
    packed = packed_layer(base, sizes)
    replace_module(model, "1.0", packed)
    assert model[1][0] is packed
    assert packed.training is training


@every_kind
def test_a_weight_that_is_not_finite_is_not_packed(kind, base, sizes):
    layer = base(*sizes)
    layer.weight.data[3].fill_(float("nan"))
    with pytest.raises(ValueError, match="output channel 3 holds NaN or infinite values"):
        pack_weight(packed_from_float(layer, 2, torch.float32), layer.weight, Rounding())


# The low-rank branch.

BRANCHED = [
    (nn.Linear, (10, 6), {}),
    (nn.Conv2d, (4, 6, 3), {"stride": 2, "padding": 1}),
    (nn.Conv2d, (4, 6, 3), {"dilation": 2, "padding": "same"}),
    (nn.Conv2d, (4, 6, (3, 2)), {"padding": 1, "padding_mode": "circular"}),
    (nn.Conv2d, (4, 6, 1), {}),
]


def random_branch(layer, rank, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in branch_shapes(layer.weight_shape, rank)]


@pytest.mark.parametrize(("base", "sizes", "options"), BRANCHED)
def test_a_branch_is_an_addition_to_the_weight(base, sizes, options):
    packed = packed_layer(base, sizes, **options)
    x = example_input(base).requires_grad_()
    bare, weight = packed(x), packed.weight
    down, up = random_branch(packed, 3)
    packed.extend_branch(down, up)
    dequantized = float_from_packed(packed)
    torch.testing.assert_close(dequantized.weight.data, weight + (up.flatten(1) @ down.flatten(1)).view_as(weight))
    assert torch.equal(dequantized.weight, packed.weight)
    found, expected = packed(x), dequantized(x)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (found, expected)))
    packed.shrink_branch(0)
    assert packed.branch_rank == 0
    assert torch.equal(packed(x), bare)


def test_branches_add_up_and_come_off_from_the_end():
    packed = packed_layer(nn.Linear, (10, 6))
    x, outputs = example_input(nn.Linear), []
    for seed, rank in enumerate((2, 3)):
        outputs.append(packed(x))
        packed.extend_branch(*random_branch(packed, rank, seed))
    assert packed.branch_rank == 5
    assert packed.state_dict().keys() == {"codes", "scale", "bias", "branch_down", "branch_up"}
    packed.shrink_branch(2)
    assert torch.equal(packed(x), outputs[1])
    packed.shrink_branch(0)
    assert torch.equal(packed(x), outputs[0])
    assert packed.state_dict().keys() == {"codes", "scale", "bias"}


@every_kind
def test_integer_inputs_are_refused(kind, base, sizes):
    layer = packed_layer(base, sizes)
    with pytest.raises(TypeError, match=r"takes floating-point inputs, got torch.int64"):
        layer(torch.ones_like(example_input(base), dtype=torch.int64))


@every_kind
def test_meta_inputs_give_meta_outputs(kind, base, sizes):
    layer = packed_layer(base, sizes).to("meta")
    assert layer(example_input(base).to("meta")).shape == packed_layer(base, sizes)(example_input(base)).shape


def test_quantizing_goes_on_the_weights_own_device():
    layer = nn.Linear(10, 6)
    expected = packed_from_float(layer, 2, torch.float32)
    pack_weight(expected, layer.weight, Rounding())
    found = packed_from_float(layer, 2, torch.float32)
    with torch.device("meta"):  # stands for a GPU that is the default device
        pack_weight(found, layer.weight, Rounding())
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)


# Forward-mode differentiation.


@every_kind
@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, 0), (torch.float32, 3), (torch.bfloat16, 0)])
def test_forward_mode_is_that_of_the_float_layer(kind, base, sizes, compute, dtype, rank):
    packed = packed_layer(base, sizes, dtype=dtype).to(dtype)
    packed.extend_branch(*random_branch(packed, rank))
    packed.set_compute(compute, "packed")
    dequantized = float_from_packed(packed)
    primals = example_input(base).to(dtype), packed.bias.detach()
    tangents = tuple(torch.randn_like(primal) for primal in primals)

    def derivative(layer):
        return torch.func.jvp(lambda x, b: torch.func.functional_call(layer, {"bias": b}, x), primals, tangents)

    torch.testing.assert_close(derivative(packed), derivative(dequantized))


def test_forward_mode_accepts_no_other_layout(monkeypatch):
    packed = packed_layer(nn.Conv2d, (4, 6, 3))
    monkeypatch.setattr(conv, "wants_channels_last", lambda *_: True)  # as on a GPU; batched tangents have no layout
    x = example_input(nn.Conv2d)
    found, expected = (
        torch.func.jacfwd(lambda part, layer=layer: layer(x + part).sum())(torch.zeros(()))
        for layer in (packed, float_from_packed(packed))
    )
    torch.testing.assert_close(found, expected)


@every_kind
@pytest.mark.parametrize("frozen", [True, False])
def test_forward_mode_by_dual_tensors(kind, base, sizes, frozen):
    packed = packed_layer(base, sizes)
    packed.bias.requires_grad_(not frozen)
    x = example_input(base)
    with forward_ad.dual_level():
        found, expected = (
            forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos())))
            for layer in (packed, float_from_packed(packed))
        )
    torch.testing.assert_close(found.primal, expected.primal)
    torch.testing.assert_close(found.tangent, expected.tangent)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch.func.linearize's own
@every_kind
def test_transforms_of_torch_that_differentiate_forwards(kind, base, sizes):
    packed = packed_layer(base, sizes)
    x = example_input(base)

    def forward(function):
        return lambda x: torch.func.jvp(function, (x,), (x.cos(),))[1]

    def derivatives(layer):
        def loss(x):
            return layer(x).pow(3).sum()

        yield forward(forward(loss))(x)
        yield forward(torch.func.grad(loss))(x)
        yield torch.func.grad(forward(loss))(x)
        yield torch.func.jacfwd(torch.func.jacfwd(lambda part: loss(x + part)))(torch.zeros(()))
        yield torch.func.linearize(loss, x)[1](x)

    torch.testing.assert_close(list(derivatives(packed)), list(derivatives(float_from_packed(packed))))


@every_kind
@pytest.mark.parametrize("training", [False, True])
def test_transforms_and_second_derivatives(kind, base, sizes, training):
    packed = packed_layer(base, sizes)
    expected = float_from_packed(packed)
    if training:
        packed = fake_quantized_from_float(expected, 2)
        expected = copy.deepcopy(expected)
        expected.weight.data = packed.codes_and_scale()[0].view_as(expected.weight) * packed.scale.view(
            -1, *[1] * (expected.weight.dim() - 1)
        )
    x = example_input(base)

    def derivatives(layer):
        def loss(x):
            return layer(x).pow(3).sum()

        yield torch.func.vmap(torch.func.grad(loss))(x)
        yield torch.func.vmap(layer)(x)
        point = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(point), point, create_graph=True)
        yield torch.autograd.grad(slope.square().sum(), point)[0]

    torch.testing.assert_close(list(derivatives(packed)), list(derivatives(expected)), rtol=1e-4, atol=1e-4)


# Outputs, inputs.


@every_kind
@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_an_output_may_be_changed_in_place(kind, base, sizes, compute, bias, dims):
    if base is nn.Conv2d and dims < 3:
        pytest.skip("an image has three dimensions")
    packed = packed_layer(base, sizes, bias=bias)
    packed.set_compute(compute, "packed")
    shape = (2, 4, 7, 7)[-dims:] if base is nn.Conv2d else (2, 3, 4, 10)[-dims:]
    x = torch.randn(shape, requires_grad=True)
    factor = torch.randn_like(packed(x))

    def changed(y):
        y *= factor
        y += 1
        return nn.ReLU(inplace=True)(y)

    found, expected = changed(packed(x)), changed(packed(x).clone())
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)))


@pytest.mark.parametrize(("base", "sizes"), [(nn.Linear, (10, 6)), (nn.Conv2d, (4, 6, 3))])
@pytest.mark.parametrize(
    "make", [packed_from_float, lambda layer, bits, dtype: fake_quantized_from_float(layer, bits)]
)
def test_inputs_are_taken_by_the_name_that_torch_gives_them(base, sizes, make):
    layer = base(*sizes)
    converted = make(layer, 2, torch.float32)
    if isinstance(converted, PackedWeight):
        pack_weight(converted, layer.weight, Rounding(iterations=2))
    x = example_input(base)
    assert torch.equal(converted(input=x), converted(x))
