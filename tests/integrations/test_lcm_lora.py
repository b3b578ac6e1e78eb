"""LoRAs of time projections, as diffusers' script for LCM trains them, on models with a table of time features."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from helpers import relative_error
from peft import LoKrConfig, LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_lora, tiny_unet
from torch import Tensor, nn

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.nn.time_features import TimeFeatureSlice

pytestmark = pytest.mark.usefixtures("one_thread")

# The default targets of diffusers' train_lcm_distill_lora_sd_wds.py, which latent-consistency/lcm-lora-sdv1-5 has.
LCM = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip

TIME_LAYERS = ["time_embedding", "time_emb_proj"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
CODING = (
    2e-3  # of a UNet's output, from the table's 0.44 %; without the time projections' adapters it is 100 times more
)


def make_pair(make_unet=tiny_unet) -> tuple[nn.Module, nn.Module]:
    """A model with a table, and one of the same decoded weights with the exact time path of the original."""
    packed = quantize_model(make_unet(), BitsFusionConfig(recipe=4, time_embedding="table"), progress=False)
    kept = BitsFusionConfig(recipe=4, time_embedding="keep", modules_to_not_convert=TIME_LAYERS)
    dequantized = quantize_model(make_unet(), kept, progress=False).dequantize()
    return packed, dequantized


@pytest.fixture(scope="module")
def originals():
    return make_pair()


@pytest.fixture
def pair(originals):
    return copy.deepcopy(originals)


def lcm_lora(rank: int = 4, seed: int = 0, unet: nn.Module | None = None) -> dict[str, Tensor]:
    return tiny_lora(tiny_unet() if unet is None else unet, LCM, rank, seed)


def time_lora(rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    return tiny_lora(tiny_unet(), ("time_emb_proj",), rank, seed)


def test_an_lcm_lora_does_what_it_does_with_the_original_time_path(pair, call_unet, recwarn):
    packed, dequantized = pair
    assert relative_error(call_unet(packed), call_unet(dequantized)) < CODING
    for model in pair:
        model.load_lora_adapter(lcm_lora(), prefix=None, adapter_name="lcm")
    assert not [warning for warning in recwarn if "Unsupported layer" in str(warning.message)]
    for timestep in (0, 501, 998.5, 1000):
        assert relative_error(call_unet(packed, timestep), call_unet(dequantized, timestep)) < CODING
    without = {name: half for name, half in lcm_lora().items() if "time_emb_proj" not in name}
    partly = copy.deepcopy(dequantized)
    partly.delete_adapters("lcm")
    partly.load_lora_adapter(without, prefix=None)
    assert relative_error(call_unet(partly), call_unet(dequantized)) > 20 * CODING


def test_several_are_mixed_switched_and_deleted(pair, call_unet):
    packed, dequantized = pair
    plain = call_unet(packed)
    for model in pair:
        model.load_lora_adapter(lcm_lora(), prefix=None, adapter_name="lcm")
        model.load_lora_adapter(time_lora(8, 1), prefix=None, adapter_name="other")
    for names, weights in ((["lcm", "other"], [0.7, 0.4]), (["other"], [1.5]), (["lcm"], [1.0])):
        for model in pair:
            model.set_adapters(names, weights)
        assert relative_error(call_unet(packed), call_unet(dequantized)) < CODING
    packed.disable_adapters()
    assert torch.equal(call_unet(packed), plain)
    packed.enable_adapters()
    packed.delete_adapters(["lcm", "other"])
    assert torch.equal(call_unet(packed), plain)


def test_a_fused_one_equals_the_unfused_and_comes_back_from_its_folder(pair, tmp_path, call_unet):
    packed, _ = pair
    packed.save_pretrained(tmp_path / "before")
    packed.load_lora_adapter(lcm_lora(), prefix=None)
    unfused = call_unet(packed)
    packed.fuse_lora()
    assert relative_error(call_unet(packed), unfused) < 1e-5
    packed.save_pretrained(tmp_path / "fused")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "fused")
    assert relative_error(call_unet(again), unfused) < CODING
    packed.unfuse_lora()
    assert torch.equal(call_unet(packed), unfused)
    packed.unload_lora()
    packed.save_pretrained(tmp_path / "after")
    before, fused, after = (load_file(tmp_path / name / WEIGHTS) for name in ("before", "fused", "after"))
    assert not [name for name in fused if "time_emb_proj" in name]  # it is in the table, which every reader reads
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_adapters_follow_the_models_dtype():
    packed = quantize_model(tiny_unet().half(), BitsFusionConfig(recipe=4, time_embedding="table"), progress=False)
    packed.load_lora_adapter(time_lora(), prefix=None)
    layer = packed.mid_block.resnets[0].time_emb_proj
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    embedding = packed.time_proj(torch.tensor([501])).half()
    assert layer(embedding).dtype == torch.float16
    packed.fuse_lora()
    assert layer(embedding).dtype == torch.float16


@pytest.mark.parametrize("target_rank", [None, 8])
def test_one_is_hot_swapped_for_another(pair, call_unet, target_rank):
    for model in pair:
        if target_rank:
            model.enable_lora_hotswap(target_rank=target_rank, check_compiled="ignore")
        model.load_lora_adapter(lcm_lora(4, 0), prefix=None, adapter_name="lcm")
        before = call_unet(model)
        model.load_lora_adapter(lcm_lora(target_rank or 4, 1), prefix=None, adapter_name="lcm", hotswap=True)
        assert relative_error(call_unet(model), before) > 20 * CODING
    assert relative_error(call_unet(pair[0]), call_unet(pair[1])) < CODING


def gradients(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    noisy, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    model(noisy, torch.tensor([3, 700]), states).sample.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_a_new_adapter_is_trained(pair):
    for model in pair:
        model.requires_grad_(False)
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=["time_emb_proj", "to_q"], init_lora_weights="gaussian"))
    found, expected = (gradients(model) for model in pair)
    assert found.keys() == expected.keys() and any("time_emb_proj" in name for name in found)
    for name, gradient in expected.items():
        if gradient.norm():
            assert relative_error(found[name], gradient) < 0.02, name


REFUSED = {
    "DoRA": LoraConfig(target_modules=["to_q", "time_emb_proj"], use_dora=True),
    "PiSSA": LoraConfig(target_modules=["to_q", "time_emb_proj"], init_lora_weights="pissa"),
    "LoKr": LoKrConfig(target_modules=["to_q", "time_emb_proj"]),
    "time_embedding": LoraConfig(target_modules=["to_q", "time_emb_proj", "time_embedding"]),
}


@pytest.mark.parametrize("config", REFUSED.values(), ids=REFUSED)
def test_what_needs_the_weight_is_refused_and_leaves_nothing(pair, call_unet, config):
    packed, _ = pair
    before, modules = call_unet(packed), [(name, type(module)) for name, module in packed.named_modules()]
    with pytest.raises(ValueError, match=r'time_emb.*time_embedding="keep"'):
        packed.add_adapter(config)
    assert [(name, type(module)) for name, module in packed.named_modules()] == modules
    assert torch.equal(call_unet(packed), before)
    packed.add_adapter(LoraConfig(target_modules=["to_q", "time_emb_proj"]))


def test_the_pipeline_takes_kohyas_names(packed_folders, source_folder):
    pipes = [StableDiffusionPipeline.from_pretrained(packed_folders["table"]) for _ in range(2)]
    layers = pipes[0].unet.hf_quantizer.quantization_config.schema.layers
    recipe = {name: layer.bits for name, layer in layers.items()}
    kept = BitsFusionConfig(recipe=recipe, time_embedding="keep", modules_to_not_convert=TIME_LAYERS)
    pipes[1].unet = quantize_model(
        UNet2DConditionModel.from_pretrained(source_folder, subfolder="unet"), kept, progress=False
    ).dequantize()
    kohya = {}
    for name, half in lcm_lora().items():
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        key = f"lora_unet_{layer.replace('.', '_')}"
        kohya |= {
            f"{key}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight": half,
            f"{key}.alpha": torch.tensor(2.0),
        }
    pictures = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        pipe.load_lora_weights(kohya)
        draw = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
        pictures.append(pipe("ab", generator=torch.Generator().manual_seed(2), **draw).images)
    assert relative_error(*pictures) < 0.02


# Other versions of the file.


def rewrite(folder: Path, drop_key: bool, drop_tensors: bool) -> None:
    """Make of a saved model what an earlier version reads, or wrote."""
    config = json.loads((folder / "config.json").read_text())
    if drop_key:
        del config["quantization_config"]["time_embedding"]["embedding_width"]
    (folder / "config.json").write_text(json.dumps(config))
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / WEIGHTS)
    if drop_tensors:
        checksums = json.loads(metadata["bitsfusion_checksums"])
        for name in ("time_proj.embedding_codes", "time_proj.embedding_scale"):
            del tensors[name], checksums["tensors"][name]
        metadata["bitsfusion_checksums"] = json.dumps(checksums)
    save_file(tensors, folder / WEIGHTS, metadata)


@pytest.mark.parametrize("drop_tensors", [False, True], ids=["read by an earlier version", "written by one"])
def test_the_time_embedding_is_an_addition_to_the_file(pair, tmp_path, call_unet, drop_tensors):
    """A reader that does not know the key ignores it with its tensors; checksums do not cover it."""
    packed, _ = pair
    expected = call_unet(packed)
    packed.save_pretrained(tmp_path)
    rewrite(tmp_path, drop_key=True, drop_tensors=drop_tensors)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(call_unet(again), expected)
    modules = [(name, type(module)) for name, module in again.named_modules()]
    with pytest.raises(ValueError, match=r'lacks the time embedding\).*time_embedding="keep"'):
        again.load_lora_adapter(lcm_lora(), prefix=None)
    assert [(name, type(module)) for name, module in again.named_modules()] == modules
    again.load_lora_adapter(tiny_lora(tiny_unet(), ("to_q",)), prefix=None)
    again.unload_lora()
    again.save_pretrained(tmp_path / "again")
    assert "time_proj.embedding_codes" not in load_file(tmp_path / "again" / WEIGHTS)


def test_a_file_without_its_time_embedding_is_refused(pair, tmp_path):
    pair[0].save_pretrained(tmp_path)
    rewrite(tmp_path, drop_key=False, drop_tensors=True)
    with pytest.raises(ValueError, match=r"lacks time_proj\.embedding_"):
        UNet2DConditionModel.from_pretrained(tmp_path)


# Dequantizing.


def wide_unet() -> UNet2DConditionModel:
    """A UNet whose time embedding is as wide as that of Stable Diffusion, and wider than the timesteps are many."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return tiny_unet(block_out_channels=(32,), time_embedding_dim=1280, **blocks)


def test_a_dequantized_model_keeps_its_adapters(call_unet):
    packed = quantize_model(wide_unet(), BitsFusionConfig(recipe=4, time_embedding="table"), progress=False)
    packed.load_lora_adapter(lcm_lora(unet=wide_unet()), prefix=None)
    expected = call_unet(packed)
    packed.dequantize()
    assert not any(isinstance(module, TimeFeatureSlice) for module in packed.modules())
    assert packed.time_embedding.linear_2.out_features == 1280
    assert relative_error(call_unet(packed), expected) < CODING


def test_a_dequantized_model_takes_adapters_of_the_original(call_unet):
    packed, dequantized = make_pair(wide_unet)
    packed.dequantize()
    for model in (packed, dequantized):
        model.load_lora_adapter(lcm_lora(unet=wide_unet()), prefix=None)
    for timestep in (1, 501, 999):
        assert relative_error(call_unet(packed, timestep), call_unet(dequantized, timestep)) < CODING


def test_a_narrow_model_with_adapters_of_time_projections_is_not_dequantized(pair, call_unet):
    packed, _ = pair
    packed.load_lora_adapter(lcm_lora(), prefix=None)
    before = call_unet(packed)
    with pytest.raises(ValueError, match=r"unload_lora_weights\(\)"):
        packed.dequantize()
    assert torch.equal(call_unet(packed), before)
    packed.fuse_lora()
    packed.unload_lora()
    packed.dequantize()
    assert relative_error(call_unet(packed), before) < CODING


def test_the_shapes_pipeline():
    """A trained model, whose time features are no random ones."""
    folder = Path(__file__).parents[2] / "examples" / "shapes" / "pipeline"
    packed, dequantized = make_pair(lambda: UNet2DConditionModel.from_pretrained(folder, subfolder="unet"))
    width, generator = dequantized.config.cross_attention_dim, torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4, 16, 16, generator=generator), 759, torch.randn(1, 9, width, generator=generator)
    with torch.no_grad():
        plain = packed(*inputs).sample
        for model in (packed, dequantized):
            model.load_lora_adapter(lcm_lora(unet=UNet2DConditionModel.from_config(dequantized.config)), prefix=None)
        assert (
            relative_error(packed(*inputs).sample, dequantized(*inputs).sample)
            < 5 * CODING
            < relative_error(packed(*inputs).sample, plain)
        )
