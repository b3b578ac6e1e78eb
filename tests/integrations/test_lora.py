"""LoRA on packed layers, against the same adapters on the dequantized model."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import KasaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny import tiny_lora, tiny_unet
from torch import Tensor, nn

from diffusers_bitsfusion import BitsFusionConfig, prepare_qat, quantize_model, size_report
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.integrations.peft_lora import PackedLoraConv2d, PackedLoraLayer, PackedLoraLinear
from diffusers_bitsfusion.nn import PackedWeight
from diffusers_bitsfusion.nn.conversion import pack_weight, packed_from_float

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = {
    "linear": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2"),
    "conv": ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "proj_in"),
}
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
WEIGHTS = "diffusion_pytorch_model.safetensors"

every_kind = pytest.mark.parametrize("kind", TARGETS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def make_lora(model: nn.Module, kind: str, rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    return tiny_lora(model, TARGETS[kind], rank, seed)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.dtype == expected.dtype
    error = (found - expected).float().norm() / expected.float().norm()
    assert error <= tolerance


def layers(model: nn.Module, kind: type) -> list:
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.fixture(scope="module")
def originals(make_config):
    """Quantized UNets and their dequantized copies by dtype, to copy from."""
    packed = {d: quantize_model(tiny_unet().to(d), make_config(), progress=False) for d in DTYPES}
    return {d: (unet, copy.deepcopy(unet).dequantize()) for d, unet in packed.items()}


@pytest.fixture
def unets(originals):
    def make(dtype=torch.float32) -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
        return copy.deepcopy(originals[dtype])

    return make


@pytest.fixture
def unet(unets):
    return unets()[0]


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


def train_config(**changes) -> LoraConfig:
    modules = r".*(to_q|to_k|to_v|to_out\.0|conv1|conv2|proj_in)"
    return LoraConfig(**({"r": 4, "lora_alpha": 4, "target_modules": modules} | changes))


def with_trainable_adapter(models, config=None):
    for model in models:
        torch.manual_seed(5)
        model.add_adapter(config or train_config())
        generator = torch.Generator().manual_seed(6)
        for layer in layers(model, LoraLayer):  # PEFT starts at zero, where half of the gradients are zero
            up = layer.lora_B["default"].weight
            up.data = 0.1 * torch.randn(up.shape, generator=generator)
        model.train()
    return models


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


# Fusing.


@pytest.mark.parametrize(("bits", "least", "most"), [(1, 0, 0), (2, 0, 0), (3, 0, 0.01), (4, 0.05, 0.15), (6, 0.9, 1)])
def test_rounding_a_fused_weight_again_would_lose_most_of_the_adapter(bits, least, most):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(320, 320, bias=False)
    layer.weight.data = torch.randn(320, 320, generator=generator)
    packed = packed_from_float(layer, bits, torch.float32)
    pack_weight(packed, layer.weight, Rounding())
    delta = torch.randn(320, 8, generator=generator) @ torch.randn(8, 320, generator=generator)
    delta *= 0.05 / delta.std()
    scale, half = packed.scale.view(torch.float32), 2 ** (bits - 1)
    change = torch.round((packed.weight + delta) / scale).clamp(-half, half) * scale - packed.weight
    kept = float((change * delta).sum() / (delta * delta).sum())
    assert least <= round(kept, 4) <= most


def fuse_two(unet: nn.Module) -> None:
    for name, kind in (("a", "linear"), ("b", "conv"), ("c", "linear")):
        unet.load_lora_adapter(make_lora(unet, kind, seed=ord(name)), prefix=None, adapter_name=name)
    unet.set_adapters(["a", "b", "c"], [0.7, 0.6, -0.4])


@every_dtype
def test_a_fused_model_equals_the_unfused_one_and_unfusing_restores_it(unets, call_unet, dtype):
    unet, _ = unets(dtype)
    bare = call_unet(unet)
    fuse_two(unet)
    unfused = call_unet(unet)
    unet.fuse_lora()
    fused = call_unet(unet)
    close(fused, unfused, 1e-3 if dtype == torch.float32 else TOLERANCE[dtype])
    assert {p.dtype for n, p in unet.named_parameters() if ".branch_" in n} == {dtype}
    unet.unfuse_lora()
    assert torch.equal(call_unet(unet), unfused)
    assert not [name for name, _ in unet.named_parameters() if ".branch_" in name]
    unet.fuse_lora()
    unet.unload_lora()
    assert torch.equal(call_unet(unet), fused)
    assert not torch.equal(fused, bare)


@every_dtype
@every_kind
def test_fusing_one_adapter_of_scale_one_changes_no_bit(unets, call_unet, kind, dtype):
    unet, _ = unets(dtype)
    unet.load_lora_adapter(make_lora(unet, kind), prefix=None)
    unfused = call_unet(unet)
    unet.fuse_lora()
    assert torch.equal(call_unet(unet), unfused)


def test_fusing_applies_to_the_named_adapters_at_the_scale(unets, call_unet):
    (unet, _), (other, _) = unets(), unets()
    for model in (unet, other):
        fuse_two(model)
    other.set_adapters(["a", "b"], [0.5 * 0.7, 0.5 * 0.6])
    unet.fuse_lora(lora_scale=0.5, adapter_names=["a", "b"])
    close(call_unet(unet), call_unet(other), 1e-5)


@every_dtype
def test_a_fused_pipeline_comes_back_from_its_folder(packed_folders, call_unet, tmp_path, dtype):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["table"], dtype=dtype)
    lora = make_lora(pipe.unet, "linear") | make_lora(pipe.unet, "conv")
    pipe.load_lora_weights({f"unet.{key}": value for key, value in lora.items()})
    unfused = call_unet(pipe.unet)
    pipe.fuse_lora()
    fused = call_unet(pipe.unet)
    pipe.save_pretrained(tmp_path / "wrapped")
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "unloaded")
    ranks = {n: m.branch_rank for n, m in pipe.unet.named_modules() if isinstance(m, PackedWeight)}
    assert set(ranks.values()) == {0, 4}
    for folder in ("wrapped", "unloaded"):
        again = StableDiffusionPipeline.from_pretrained(tmp_path / folder, dtype=dtype)
        assert again.unet.state_dict().keys() == pipe.unet.state_dict().keys()
        assert torch.equal(call_unet(again.unet), fused)
        config = json.loads((tmp_path / folder / "unet" / "config.json").read_text())["quantization_config"]
        assert {name: layer.get("branch_rank", 0) for name, layer in config["layers"].items()} == ranks
    close(fused, unfused, 1e-3 if dtype == torch.float32 else TOLERANCE[dtype])


def test_saving_after_unfusing_has_no_branches(unet, tmp_path):
    fuse_two(unet)
    unet.fuse_lora()
    unet.save_pretrained(tmp_path)
    unet.unfuse_lora()
    unet.unload_lora()
    unet.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / WEIGHTS) if ".branch_" in name]
    assert "branch_rank" not in (tmp_path / "config.json").read_text()


def test_saving_says_which_adapters_it_leaves_out(unet, unets, call_unet, tmp_path, caplog):
    fuse_two(unet)
    unet.fuse_lora(adapter_names=["b"])
    with caplog.at_level("WARNING", logger="diffusers"):
        unet.save_pretrained(tmp_path)
    assert "without its adapters a, c" in caplog.text
    only_b, _ = unets()
    fuse_two(only_b)
    only_b.set_adapters(["b"], [0.6])
    close(call_unet(UNet2DConditionModel.from_pretrained(tmp_path)), call_unet(only_b), 1e-5)


def test_more_can_be_fused_onto_what_was_fused_and_saved(unet, call_unet, tmp_path):
    unet.load_lora_adapter(make_lora(unet, "linear"), prefix=None)
    unet.fuse_lora()
    unet.save_pretrained(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path)
    first = call_unet(unet)
    unet.load_lora_adapter(make_lora(unet, "linear", rank=2, seed=1), prefix=None)
    both = call_unet(unet)
    unet.fuse_lora()
    close(call_unet(unet), both, 1e-5)
    assert {layer.branch_rank for layer in layers(unet, PackedWeight)} == {0, 6}
    unet.unfuse_lora()
    unet.unload_lora()
    assert torch.equal(call_unet(unet), first)


def test_fusing_twice_and_unfusing_the_unfused_warn_and_change_nothing(unet, call_unet):
    unet.load_lora_adapter(make_lora(unet, "linear"), prefix=None)
    before = call_unet(unet)
    with pytest.warns(UserWarning, match="Already unmerged"):
        unet.unfuse_lora()
    assert torch.equal(call_unet(unet), before)
    unet.fuse_lora()
    fused = call_unet(unet)
    with pytest.warns(UserWarning, match="already merged"):
        unet.fuse_lora()
    assert torch.equal(call_unet(unet), fused)
    assert {layer.branch_rank for layer in layers(unet, PackedWeight)} == {0, 4}


def test_merging_by_peft_alone_works_too(unets, call_unet):
    unet, dequantized = unets()
    config = train_config(target_modules=["to_q", "conv1"], init_lora_weights=False)
    outputs = []
    for model in (unet, dequantized):
        torch.manual_seed(0)
        outputs.append(call_unet(get_peft_model(model, config).merge_and_unload(safe_merge=True)))
    close(*outputs, 1e-5)


def test_safe_fusing_refuses_what_is_not_finite(unet):
    lora = make_lora(unet, "linear")
    next(iter(lora.values()))[0, 0] = math.nan
    unet.load_lora_adapter(lora, prefix=None)
    with pytest.raises(ValueError, match="default_0 hold NaN or infinite"):
        unet.fuse_lora(safe_fusing=True)


def test_the_size_report_has_branches_and_loaded_adapters_apart(unet, tmp_path):
    part = "LoRA branches"
    bare = size_report(unet)
    assert bare.parts[part] == 0
    lora = make_lora(unet, "linear") | make_lora(unet, "conv")
    size = sum(value.nbytes for value in lora.values())
    unet.load_lora_adapter(lora, prefix=None)
    loaded = size_report(unet)
    unet.fuse_lora()
    unet.unload_lora()
    fused = size_report(unet)
    for report in (loaded, fused):
        assert report.parts == bare.parts | {part: size}
        assert report.average_bits == bare.average_bits
        assert report.fp16_bytes == bare.fp16_bytes
    unet.save_pretrained(tmp_path)
    assert size_report(tmp_path).parts[part] == size


@every_dtype
def test_dequantizing_folds_the_branch_into_the_weight(unets, call_unet, tmp_path, dtype):
    unet, _ = unets(dtype)
    fuse_two(unet)
    unet.fuse_lora()
    fused = call_unet(unet)
    weights = {name: module.weight for name, module in unet.named_modules() if isinstance(module, PackedWeight)}
    unet.dequantize()
    close(call_unet(unet), fused, TOLERANCE[dtype])
    for name, weight in weights.items():
        if "lora_" not in name:
            assert torch.equal(unet.get_submodule(name).weight, weight)
    unet.unload_lora()
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path, dtype=dtype)
    close(call_unet(again), fused, TOLERANCE[dtype])


def test_after_dequantizing_adapters_are_peft_s_own(unets, call_unet):
    unet, dequantized = unets()
    unet.load_lora_adapter(make_lora(unet, "linear"), prefix=None)
    unet.fuse_lora()
    unet.dequantize()
    unet.unfuse_lora()
    unet.unload_lora()
    close(call_unet(unet), call_unet(dequantized), 1e-5)


# Variants, and what cannot be.


@pytest.mark.parametrize("variant", ["use_rslora", "use_dora"])
def test_variants_of_lora_do_what_they_do_on_the_dequantized_model(unets, call_unet, variant):
    packed, dequantized = with_trainable_adapter(unets(), train_config(**{variant: True}))
    for model in (packed, dequantized):
        train_step(model)
    for name, gradient in gradients(packed).items():
        close(gradient, gradients(dequantized)[name], 1e-4)
    close(call_unet(packed.eval()), call_unet(dequantized.eval()), 1e-5)


def test_rslora_is_fused_with_its_scale(unet, call_unet):
    with_trainable_adapter([unet], train_config(use_rslora=True, lora_alpha=3))
    unfused = call_unet(unet.eval())
    unet.fuse_lora()
    close(call_unet(unet), unfused, 1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (train_config(use_dora=True), "Dora.*Variant changes the weight by more"),
        (train_config(lora_bias=True), "has a bias"),
        (LoKrConfig(r=4, alpha=4, target_modules=["to_q"]), "no LoRA"),
    ],
    ids=["dora", "bias", "lokr"],
)
def test_what_is_no_low_rank_addition_is_refused_before_anything_is_fused(unet, call_unet, config, reason):
    unet.add_adapter(LoraConfig(r=4, target_modules=["conv1", "ff.net.2"]), adapter_name="plain")
    unet.add_adapter(config, adapter_name="other")
    unet.set_adapters(["plain", "other"])
    before = call_unet(unet)
    with pytest.raises(ValueError, match=reason):
        unet.fuse_lora()
    assert not [layer for layer in layers(unet, PackedWeight) if layer.branch_rank]
    assert torch.equal(call_unet(unet), before)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_a_grouped_convolution_accepts_an_adapter_but_no_fusing():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, groups=2)
    packed = packed_from_float(conv, 4, torch.float32)
    pack_weight(packed, conv.weight, Rounding(iterations=2))
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(packed), config)
    x = torch.randn(1, 4, 6, 6)
    layer = model.base_model.model[0]
    lora = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    close(model(x), packed(x) + lora, 1e-6)
    with pytest.raises(ValueError, match="2 groups"):
        model.merge_adapter()


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


def test_a_variant_that_truncates_the_base_weight_is_refused(unet):
    with pytest.raises(ValueError, match="unsupported variant combination"):
        unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"], kasa_config=KasaConfig()))


def test_offloaded_weights_are_not_fused(unet):
    unet.load_lora_adapter(make_lora(unet, "linear"), prefix=None)
    layer = layers(unet, PackedLoraLinear)[0]
    layer.base_layer.codes = nn.Parameter(layer.base_layer.codes.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match="fuse before offloading"):
        unet.fuse_lora()


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


# Checkpoints with branches.


@pytest.fixture
def fused_folder(unet, tmp_path) -> Path:
    unet.load_lora_adapter(make_lora(unet, "linear"), prefix=None)
    unet.fuse_lora()
    unet.save_pretrained(tmp_path)
    return tmp_path


def change_tensors(folder: Path, change) -> str:
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith(".branch_up"))
    change(tensors, name)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "lacks {}"),
        (lambda tensors, name: tensors.update({name: tensors[name][:, :3].contiguous()}), "{} must be floating"),
        (lambda tensors, name: tensors.update({name: tensors[name].int()}), "{} must be floating"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_a_corrupted_branch_is_refused(fused_folder, change, message):
    name = change_tensors(fused_folder, change)
    with pytest.raises(ValueError, match=message.format(name)):
        UNet2DConditionModel.from_pretrained(fused_folder)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (None, "branch_rank 0"),
        (3, "branch_rank 3"),
        (0, "from 1"),
        (-1, "from 1"),
        ("4", "from 1"),
        (10**20, "from 1"),
    ],
)
def test_a_branch_must_be_as_the_config_says(fused_folder, rank, message):
    path = fused_folder / "config.json"
    config = json.loads(path.read_text())
    for layer in config["quantization_config"]["layers"].values():
        if "branch_rank" in layer:
            layer["branch_rank"] = rank
            if rank is None:
                del layer["branch_rank"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        UNet2DConditionModel.from_pretrained(fused_folder)
