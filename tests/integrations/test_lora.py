"""LoRA on packed layers: outputs, training and variants, against the same adapters on the dequantized model.

Fusing: test_lora_fusing.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from lora_cases import (
    TARGETS,
    TOLERANCE,
    close,
    every_dtype,
    every_kind,
    layers,
    make_lora,
    train_config,
    with_trainable_adapter,
)
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from tiny import tiny_unet
from torch import Tensor, nn

from diffusers_bitsfusion import BitsFusionConfig, prepare_qat
from diffusers_bitsfusion.integrations.peft_lora import PackedLoraConv2d, PackedLoraLayer, PackedLoraLinear
from diffusers_bitsfusion.nn import PackedWeight

pytestmark = pytest.mark.usefixtures("one_thread")


# Adapters beside the layer.


@every_dtype
@every_kind
def test_an_adapter_does_what_it_does_on_the_dequantized_model(unets, call_unet, kind, dtype):
    packed, dequantized = unets(dtype)
    bare, lora = call_unet(packed), make_lora(packed, kind)
    for model in (packed, dequantized):
        model.load_lora_adapter(lora, prefix=None)
    close(call_unet(packed), call_unet(dequantized), TOLERANCE[dtype])
    assert (call_unet(packed) - bare).float().norm() > 0.1 * bare.float().norm()
    assert layers(packed, PackedLoraLinear if kind == "linear" else PackedLoraConv2d)
    assert not [layer for layer in layers(packed, LoraLayer) if not isinstance(layer, PackedLoraLayer)]
    assert not layers(dequantized, PackedLoraLayer)
    assert {a.weight.dtype for layer in layers(packed, LoraLayer) for a in layer.lora_A.values()} == {dtype}
    packed.unload_lora()
    assert torch.equal(call_unet(packed), bare)


@every_dtype
def test_a_pipeline_mixes_adapters_by_their_weights(packed_folders, dtype):
    packed = StableDiffusionPipeline.from_pretrained(packed_folders["keep"], dtype=dtype)
    dequantized = StableDiffusionPipeline.from_pretrained(packed_folders["keep"], dtype=dtype)
    dequantized.unet.dequantize()
    loras = {"a": make_lora(packed.unet, "linear"), "b": make_lora(packed.unet, "conv", seed=1)}
    images = []
    for pipe in (packed, dequantized):
        pipe.set_progress_bar_config(disable=True)
        for name, lora in loras.items():
            pipe.load_lora_weights({f"unet.{key}": value for key, value in lora.items()}, adapter_name=name)
        for names, weights in ((["a", "b"], [0.7, 0.4]), (["b"], [1.0]), (["a", "b"], [-0.3, 0.9])):
            pipe.set_adapters(names, adapter_weights=weights)
            generator = torch.Generator().manual_seed(1)
            images.append(pipe("a cab", num_inference_steps=2, generator=generator, output_type="latent").images)
    for found, expected in zip(images[:3], images[3:], strict=True):
        close(found, expected, 20 * TOLERANCE[dtype])
    assert not torch.allclose(images[0], images[1], rtol=0.05)


def kohya_keys(lora: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    state = {}
    for key, value in lora.items():
        name, part = key.removesuffix(".weight").rsplit(".", 1)
        name = f"lora_unet_{name.replace('.', '_')}"
        state[f"{name}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = value
        state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


@every_kind
def test_kohya_files_load(packed_folders, call_unet, tmp_path, kind):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["keep"])
    lora = make_lora(pipe.unet, kind, rank=4)
    save_file(kohya_keys(lora, alpha=2.0), tmp_path / "kohya.safetensors")
    pipe.load_lora_weights(tmp_path / "kohya.safetensors")
    found = call_unet(pipe.unet)
    pipe.unload_lora_weights()
    halved = {key: value / 2 if "lora_B" in key else value for key, value in lora.items()}
    pipe.load_lora_weights({f"unet.{key}": value for key, value in halved.items()})
    close(found, call_unet(pipe.unet), 1e-5)


def test_an_adapter_is_swapped_in_place(unets, call_unet):
    swapped, fresh = unets()[0], unets()[0]
    for kind in TARGETS:
        swapped.enable_lora_hotswap(target_rank=8, check_compiled="ignore")
        swapped.load_lora_adapter(make_lora(swapped, kind, rank=4), prefix=None, adapter_name=kind)
        swapped.load_lora_adapter(make_lora(fresh, kind, rank=8, seed=1), prefix=None, adapter_name=kind, hotswap=True)
        fresh.load_lora_adapter(make_lora(fresh, kind, rank=8, seed=1), prefix=None, adapter_name=kind)
        swapped.set_adapters([kind])
        fresh.set_adapters([kind])
        close(call_unet(swapped), call_unet(fresh), 1e-5)
    swapped.fuse_lora()
    close(call_unet(swapped), call_unet(fresh), 1e-5)


def test_nothing_decodes_a_weight_to_ask_for_its_dtype(unet, call_unet, decodes):
    linear, conv = (make_lora(unet, kind) for kind in TARGETS)
    num_layers = len(layers(unet, PackedWeight))
    decodes["read"] = 0
    unet.load_lora_adapter(linear, prefix=None, adapter_name="linear")
    unet.load_lora_adapter(conv, prefix=None, adapter_name="conv")
    assert decodes["read"] == 0
    decodes["read"] = decodes["call"] = 0
    call_unet(unet)
    unet.set_adapters(["linear", "conv"], [0.3, 0.4])
    unet.fuse_lora()
    unet.unfuse_lora()
    assert decodes == {"read": 0, "call": num_layers}


# Training.


def train_step(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    states = torch.randn(2, 5, 32, generator=generator)
    loss = nn.functional.mse_loss(unet(noisy, torch.tensor([10, 900]), states).sample, noise)
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_an_adapter_are_those_on_the_dequantized_model(unets, checkpointing):
    packed, dequantized = with_trainable_adapter(unets())
    for model in (packed, dequantized):
        if checkpointing:
            model.enable_gradient_checkpointing()
        train_step(model)
    found, expected = gradients(packed), gradients(dequantized)
    assert found.keys() == expected.keys() and found
    assert all(".lora_" in name for name in found)
    for name, gradient in found.items():
        close(gradient, expected[name], 1e-5)


def test_training_lowers_the_loss_and_the_adapter_fits_the_full_model(unets, call_unet, tmp_path):
    packed, dequantized = unets()
    packed.add_adapter(train_config())
    packed.train()
    trained = [p for p in packed.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(train_step(packed))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    packed.save_lora_adapter(tmp_path)
    dequantized.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    close(call_unet(packed.eval()), call_unet(dequantized), 1e-5)


# Variants, and what cannot be.


@pytest.mark.parametrize("variant", ["use_rslora", "use_dora"])
def test_variants_of_lora_do_what_they_do_on_the_dequantized_model(unets, call_unet, variant):
    packed, dequantized = with_trainable_adapter(unets(), train_config(**{variant: True}))
    for model in (packed, dequantized):
        train_step(model)
    for name, gradient in gradients(packed).items():
        close(gradient, gradients(dequantized)[name], 1e-4)
    close(call_unet(packed.eval()), call_unet(dequantized.eval()), 1e-5)


@pytest.mark.parametrize("init", ["loftq", "corda", "lora_ga"])
def test_initialisations_that_rewrite_the_base_weight_are_refused(unet, init):
    config = LoraConfig(r=4, target_modules=["to_q"])
    config.init_lora_weights = init
    with pytest.raises(ValueError, match="changes the base weight"):
        unet.add_adapter(config)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_an_initialisation_subtracts_from_the_base_weight_is_a_branch(unets, call_unet, tmp_path, init):
    unet, dequantized = unets()
    bare = call_unet(unet)
    config = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=init)
    for model in (unet, dequantized):
        model.add_adapter(copy.deepcopy(config))
        close(call_unet(model), bare, 1e-5)
        for layer in layers(model, LoraLayer):
            layer.lora_B["default"].weight.data *= 1.1  # a training
    close(call_unet(unet), call_unet(dequantized), 1e-5)
    unet.fuse_lora()
    close(call_unet(unet), call_unet(dequantized), 1e-5)
    with pytest.raises(ValueError, match="unmerge the other adapters first"):
        unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=init), adapter_name="second")
    unet.unfuse_lora()
    close(call_unet(unet), call_unet(dequantized), 1e-5)
    for model in (unet, dequantized):
        model.unload_lora()  # which leaves the rest, as PEFT does
    close(call_unet(unet), call_unet(dequantized), 1e-5)
    unet.save_pretrained(tmp_path)
    assert torch.equal(call_unet(UNet2DConditionModel.from_pretrained(tmp_path)), call_unet(unet))


def test_adapters_on_a_model_in_training_have_plain_halves(call_unet):
    unet = prepare_qat(tiny_unet(), BitsFusionConfig(recipe=4, time_embedding="keep"))
    kinds = {name: type(module) for name, module in unet.named_modules()}
    bare = call_unet(unet)
    unet.add_adapter(train_config(init_lora_weights=False))
    adapted = call_unet(unet)
    assert {type(h) for m in layers(unet, LoraLayer) for h in (*m.lora_A.values(), *m.lora_B.values())} == {
        nn.Linear,
        nn.Conv2d,
    }
    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer):
            assert type(module.get_base_layer()) is kinds[name]
    unet.disable_adapters()
    assert torch.equal(call_unet(unet), bare) and not torch.allclose(adapted, bare)


def test_an_adapter_of_another_architecture_gives_peft_s_error(packed_folders, call_unet):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["keep"])
    before = call_unet(pipe.unet)
    other = make_lora(tiny_unet(cross_attention_dim=48), "linear")
    with pytest.raises(RuntimeError, match=r"size mismatch for .*to_k.lora_A"):
        pipe.load_lora_weights({f"unet.{key}": value for key, value in other.items()})
    pipe.unload_lora_weights()
    assert torch.equal(call_unet(pipe.unet), before)


def test_an_adapter_of_the_time_embedding_needs_the_time_embedding(packed_folders):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["cache"])
    name = "unet.down_blocks.0.resnets.0.time_emb_proj"
    lora = {f"{name}.lora_A.weight": torch.zeros(4, 128), f"{name}.lora_B.weight": torch.zeros(32, 4)}
    with pytest.raises(ValueError, match='time_embedding="keep"'):
        pipe.load_lora_weights(lora)


def test_diffusers_average_of_weights_averages_the_adapter_and_keeps_the_codes(unet):
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    unet.requires_grad_(False)
    trained = {name: p for name, p in unet.named_parameters() if "lora" in name}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    average = EMAModel(unet.parameters(), decay=0.5, min_decay=0.5)
    average.step(unet.parameters())  # The first step takes the weights as they are.
    for parameter in trained.values():
        parameter.data += 1
    average.step(unet.parameters())
    average.copy_to(unet.parameters())
    for name, parameter in unet.named_parameters():
        expected = before[name] + 0.5 if name in trained else before[name]
        torch.testing.assert_close(parameter.detach(), expected)
