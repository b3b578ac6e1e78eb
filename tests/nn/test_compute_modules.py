"""What packed models compute beside layers: attention, gated activations, transformers in channels last."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import Transformer2DModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from helpers import attentions, relative_error
from peft import LoraConfig
from tiny import tiny_unet
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_bitsfusion import set_compute, size_report
from diffusers_bitsfusion.nn.attention import BFloat16Attention, restore_attention, set_attention
from diffusers_bitsfusion.nn.feed_forward import FusedGEGLU
from diffusers_bitsfusion.nn.transformer import set_channels_last
from diffusers_bitsfusion.ops import linear as linear_module

pytestmark = pytest.mark.usefixtures("one_thread")


# Attention.


def processors(model):
    return {type(module.processor) for module in attentions(model)}


def test_packed_models_bring_their_attention_and_dequantizing_gives_diffusers_own_back(packed_unet):
    for compute in ("exact", "int8", "exact"):
        set_compute(packed_unet, compute)
        assert {type(module) for module in attentions(packed_unet)} == {BFloat16Attention}
        assert processors(packed_unet) == {AttnProcessor2_0}
    copied = pickle.loads(pickle.dumps(copy.deepcopy(packed_unet)))
    assert {module.any_dtype for module in attentions(copied)} == {False}
    plain = tiny_unet()
    for module, own in zip(attentions(packed_unet.dequantize()), attentions(plain), strict=True):
        assert type(module) is Attention and module.__dict__.keys() == own.__dict__.keys()


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_the_processors_of_others_compute(packed_unet, call_unet, compute):
    class Zeros:
        def __call__(self, attn, hidden_states, **kwargs):
            return torch.zeros_like(hidden_states)

    set_compute(packed_unet, compute)
    before, own = call_unet(packed_unet), Zeros()
    packed_unet.set_attn_processor(own)
    assert not torch.allclose(call_unet(packed_unet), before)
    assert set(map(id, packed_unet.attn_processors.values())) == {id(own)}
    packed_unet.set_attn_processor(AttnProcessor())
    assert size_report(packed_unet).attention_kernels == {}
    packed_unet.set_default_attn_processor()  # which refuses processors that it does not know
    packed_unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(call_unet(packed_unet), before)


@pytest.mark.parametrize(
    "more",
    [{"residual_connection": True}, {"norm_num_groups": 2}, {"rescale_output_factor": 2.0}, {"qk_norm": "layer_norm"}],
)
def test_attention_with_more_around_it_stays_diffusers_own(more):
    attn = Attention(query_dim=8, heads=2, dim_head=4, processor=AttnProcessor2_0(), **more)
    set_attention(attn, any_dtype=True)
    assert type(attn) is Attention


@pytest.mark.parametrize("states", [None, torch.linspace(-1, 1, 2 * 7 * 6).view(2, 7, 6)])
@pytest.mark.parametrize("case", ["float32", "bfloat16", "masked", "any dtype"])
def test_the_module_computes_what_diffusers_own_does(states, case):
    torch.manual_seed(0)
    attn = Attention(query_dim=8, cross_attention_dim=None if states is None else 6, heads=2, dim_head=4, bias=True)
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    attn, x, states = attn.to(dtype), torch.randn(2, 5, 8, dtype=dtype), states if states is None else states.to(dtype)
    mask = torch.zeros(2, 1, 5 if states is None else 7).index_fill(2, torch.tensor([1]), -1e4)
    mask = mask if case == "masked" else None
    with torch.no_grad():
        expected = attn(x, states, attention_mask=mask)
        set_attention(attn, any_dtype=case == "any dtype")
        found = attn(x, states, attention_mask=mask)
        restore_attention(attn)
        assert torch.equal(attn(x, states, attention_mask=mask), expected)
    assert type(attn) is Attention and found.dtype == dtype
    error = relative_error(found, expected)
    assert error < 2**-6 if case in ("bfloat16", "any dtype") else error == 0


def test_exact_attention_rounds_no_more_than_torchs(monkeypatch):
    """In bf16, beside double precision."""
    torch.manual_seed(0)
    attn = Attention(query_dim=64, heads=4, dim_head=16).bfloat16()
    x = torch.randn(2, 300, 64).bfloat16()
    with torch.no_grad():
        theirs = attn(x)
        expected = copy.deepcopy(attn).double()(x.double())
        set_attention(attn, any_dtype=False)
        found = attn(x)
    assert relative_error(found, expected) < 1.1 * relative_error(theirs, expected)


def test_layers_within_an_attention_learn_beside_it(packed_unet):
    """Gradients reach adapters of queries and keys, which lie before the attention."""
    packed_unet.requires_grad_(False)
    set_compute(packed_unet, "int8")
    packed_unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    packed_unet(torch.randn(1, 4, 8, 8), 501, torch.randn(1, 5, 32)).sample.sum().backward()
    adapters = [p for name, p in packed_unet.named_parameters() if "lora" in name]
    assert adapters and all(p.grad.abs().sum() > 0 for p in adapters)


# Gated activations.


def gates(model):
    return [module for module in model.modules() if isinstance(module, GEGLU)]


def test_gates_are_computed_with_their_projections(packed_unet, call_unet, monkeypatch):
    unet, calls = packed_unet, []
    rescale_geglu = linear_module.rescale_geglu
    monkeypatch.setattr(linear_module, "rescale_geglu", lambda *args: calls.append(1) or rescale_geglu(*args))
    set_compute(unet, "int8")
    assert {type(gate) for gate in gates(unet)} == {FusedGEGLU}
    found = call_unet(unet)
    assert len(calls) == len(gates(unet)) > 0
    set_compute(unet, "exact")
    call_unet(unet)
    assert len(calls) == len(gates(unet))  # diffusers' own, in fp32
    set_compute(unet, "int8")
    monkeypatch.setattr(FusedGEGLU, "forward", GEGLU.forward)
    # In one operation with the projection or after it: the same but for rounding.
    assert relative_error(found, call_unet(unet)) < 1e-3
    assert len(calls) == len(gates(unet))
    assert {type(gate) for gate in gates(unet.dequantize())} == {GEGLU}


def test_a_hook_on_the_projection_of_a_gate_sees_what_it_alone_gives(packed_unet, call_unet):
    set_compute(packed_unet, "int8")
    seen, projections = [], [gate.proj for gate in gates(packed_unet)]
    for projection in projections:
        projection.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    call_unet(packed_unet)
    assert seen and sorted(seen) == sorted(projection.out_features for projection in projections)


@pytest.mark.parametrize("compute", ["int8", "exact"])
@pytest.mark.parametrize("tokens", [0, 5, 300])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_is_its_projections_halves(packed_unet, monkeypatch, dtype, bias, tokens, compute):
    monkeypatch.setattr(linear_module, "_FEWEST_TOKENS", 64)
    monkeypatch.setattr(linear_module, "MAX_SUMS", 1)
    set_compute(packed_unet, compute)
    gate = gates(packed_unet)[0]
    gate.proj.bias = gate.proj.bias if bias else None
    x = torch.randn(2, tokens, gate.proj.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        hidden, opening = gate.proj(x).float().chunk(2, dim=-1)
        found = gate(x)
    assert found.dtype == dtype and found.shape == hidden.shape
    assert (
        tokens == 0 or relative_error(found.float(), hidden * nn.functional.gelu(opening)) < 8 * torch.finfo(dtype).eps
    )


def test_gates_learn_and_adapters_within_them_count(packed_unet):
    set_compute(packed_unet, "int8")
    gate = gates(packed_unet)[0]
    x = torch.randn(1, 3, gate.proj.in_features, requires_grad=True)
    y = gate(x)
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(gate(x), y)
        packed_unet.add_adapter(LoraConfig(r=2, target_modules=["net.0.proj"], init_lora_weights=False))
        adapted = gate(x)
        packed_unet.disable_adapters()
        torch.testing.assert_close(gate(x), y)
    assert relative_error(adapted, y) > 0.01


def test_forward_mode_is_that_of_the_dequantized_model(packed_unet):
    """Tangents pass through layers, gates and attention, whose operators for integers carry none."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4, 8, 8), (1, 5, 32)
    primals, tangents = (tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(2))

    def predict(sample, states):
        with sdpa_kernel(SDPBackend.MATH):  # torch's others have no forward mode
            return packed_unet(sample, 501, states).sample

    set_compute(packed_unet.requires_grad_(False), "int8")
    found = torch.func.jvp(predict, primals, tangents)
    packed_unet.dequantize()
    torch.testing.assert_close(found, torch.func.jvp(predict, primals, tangents), rtol=1e-3, atol=1e-3)


# Memory formats.


@pytest.mark.parametrize("linear", [False, True])
def test_transformers_keep_images_channels_last_and_compute_the_same(linear):
    torch.manual_seed(0)
    model = nn.Sequential(Transformer2DModel(2, 4, in_channels=8, norm_num_groups=2, use_linear_projection=linear))
    model.bfloat16()
    x = torch.randn(2, 8, 3, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model[0](x).sample
        set_channels_last(model, True)
        assert type(model[0]) is not Transformer2DModel and type(model[0]).__name__ == "Transformer2DModel"
        found = model[0](x).sample
        set_channels_last(model, False)
        set_channels_last(model[0], True)  # as a model, whose file names its class
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert type(model[0]) is Transformer2DModel


def test_transformers_in_fp32_give_the_same_bits():
    torch.manual_seed(0)
    model = nn.Sequential(Transformer2DModel(2, 4, in_channels=8, norm_num_groups=2))
    x = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model[0](x).sample
        set_channels_last(model, True)
        assert torch.equal(model[0](x).sample, expected)
