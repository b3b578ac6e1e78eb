"""Every kind of model: quantized, it computes what its dequantized copy computes, before and after a reload."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from diffusers import (
    ControlNetModel,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from helpers import relative_error
from tiny import SD2, SDXL, tiny_controlnet, tiny_unet
from tiny_transformers import tiny_flux, tiny_pixart, tiny_sana, tiny_sd3
from torch import Tensor, nn

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.nn import PackedWeight, TimeFeatures

pytestmark = pytest.mark.usefixtures("one_thread")

UNETS = {
    "SD 1.x": {},
    "SD 2.x": SD2,
    "SDXL": SDXL,
    "LCM": {"time_cond_proj_dim": 16},
    "inpainting": {"in_channels": 9},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
}


TRANSFORMERS = {"PixArt": tiny_pixart, "SD3": tiny_sd3, "Flux": tiny_flux, "Sana": tiny_sana}


def build(name: str) -> ModelMixin:
    if name == "ControlNet":
        return with_open_zero_convolutions(tiny_controlnet())
    return TRANSFORMERS[name]() if name in TRANSFORMERS else tiny_unet(**UNETS[name])


def with_open_zero_convolutions(controlnet: ControlNetModel) -> ControlNetModel:
    """A fresh ControlNet's outputs are zero whatever it computes; random weights let them through."""
    torch.manual_seed(1)
    for module in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        nn.init.normal_(module.weight, std=0.1)
    nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.1)
    return controlnet


def call(model: ModelMixin, timestep: int = 501) -> Tensor:
    """All outputs of a model on fixed random inputs, in one row."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(model.dtype)

    time = torch.tensor([timestep, timestep])
    with torch.no_grad():
        match model:
            case ControlNetModel():
                down, mid = model(random(2, 4, 8, 8), time, random(2, 5, 32), random(2, 3, 16, 16), return_dict=False)
                return torch.cat([output.flatten() for output in (*down, mid)])
            case UNet2DConditionModel():
                arguments = {}
                if model.config.addition_embed_type == "text_time":
                    arguments["added_cond_kwargs"] = {"text_embeds": random(2, 32), "time_ids": torch.ones(2, 6)}
                if model.config.time_cond_proj_dim:
                    arguments["timestep_cond"] = random(2, 16)
                sample = random(2, model.config.in_channels, 8, 8)
                output = model(sample, time, random(2, 5, model.config.cross_attention_dim), **arguments)
            case PixArtTransformer2DModel():
                conditions = {"resolution": None, "aspect_ratio": None}
                output = model(random(2, 4, 8, 8), random(2, 5, 24), time, added_cond_kwargs=conditions)
            case SD3Transformer2DModel():
                output = model(random(2, 4, 8, 8), random(2, 5, 32), random(2, 16), time)
            case SanaTransformer2DModel():
                output = model(random(2, 4, 8, 8), random(2, 5, 24), time)
            case FluxTransformer2DModel():
                ids = torch.zeros(16, 3), torch.zeros(5, 3)
                output = model(
                    random(2, 16, 16),
                    random(2, 5, 32),
                    random(2, 16),
                    time / 1000,
                    img_ids=ids[0],
                    txt_ids=ids[1],
                    guidance=torch.full((2,), 3.5),
                )
    return output.sample.flatten()


def quantized(model: ModelMixin, **changes) -> ModelMixin:
    return quantize_model(model, BitsFusionConfig(**({"target_bits": 2.6} | changes)), progress=False)


def dequantized(model: ModelMixin) -> ModelMixin:
    """A dequantized copy. Without gradients, as packed weights: torch chooses kernels by that."""
    return copy.deepcopy(model).dequantize().requires_grad_(False)


ALL = [*UNETS, "ControlNet", *TRANSFORMERS]
WITHOUT_TABLE = ["SDXL", "LCM", *TRANSFORMERS]
WITH_TABLE = [name for name in ALL if name not in WITHOUT_TABLE]


@pytest.mark.parametrize("name", ALL)
def test_a_quantized_model_computes_what_its_dequantized_copy_does(name):
    model = quantized(build(name), time_embedding="keep")
    output = call(model)
    assert output.isfinite().all() and output.std() > 0
    assert torch.equal(call(dequantized(model)), output)


@pytest.mark.parametrize("name", ALL)
def test_quantizing_changes_the_output_but_little_at_seven_bits(name):
    expected = call(build(name))
    coarse = relative_error(call(quantized(build(name), time_embedding="keep", recipe=1)), expected)
    fine = relative_error(call(quantized(build(name), time_embedding="keep", recipe=7)), expected)
    assert 0 < fine < 0.05 < coarse


@pytest.mark.parametrize("name", ALL)
def test_every_layer_is_packed(name):
    model = quantized(build(name), time_embedding="keep")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert layers and all(isinstance(m, PackedWeight) for m in layers.values())
    assert layers.keys() == model.config.quantization_config.layers.keys()


@pytest.mark.parametrize("kind", ["keep", "table", "cache"])
@pytest.mark.parametrize("name", ALL)
def test_a_saved_model_comes_back_with_equal_outputs(name, kind, tmp_path):
    model = quantized(build(name), time_embedding=kind)
    model.save_pretrained(tmp_path)
    loaded = type(build(name)).from_pretrained(tmp_path)
    assert type(loaded).__name__ == type(model).__name__
    assert torch.equal(call(loaded), call(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_a_model_in_half_precision_equals_its_dequantized_copy(name, dtype):
    model = quantized(build(name).to(dtype), time_embedding="keep")
    assert model.dtype == dtype
    output = call(model)
    assert output.dtype == dtype and output.isfinite().all()
    plain = dequantized(model)
    if dtype == torch.float16:
        assert torch.equal(call(plain), output)
    else:  # in bf16 kernels of this package sum in another order than torch's
        assert_no_further_from_fp32(model, plain)


def assert_no_further_from_fp32(model, plain):
    """Compare the errors of two models in bf16, over many timesteps since those of one input scatter."""
    exact = copy.deepcopy(plain).float()
    errors = torch.zeros(2)
    for timestep in range(1, 1000, 37):
        expected = call(exact, timestep)
        errors += torch.stack([(call(each, timestep).float() - expected).square().sum() for each in (model, plain)])
    error, error_of_torch = errors.sqrt()
    assert error <= 1.02 * error_of_torch


# The time embedding.


@pytest.mark.parametrize("kind", ["table", "cache"])
@pytest.mark.parametrize("name", WITH_TABLE)
def test_time_features_take_the_place_of_the_time_embedding(name, kind):
    source = build(name)
    parameters = sum(p.numel() for n, p in source.named_parameters() if "time_emb" in n)
    model = quantized(source, time_embedding=kind)
    assert model.config.quantization_config.time_embedding["type"] == kind
    assert isinstance(model.time_proj, TimeFeatures)
    assert not any("time_emb" in n for n, _ in model.named_parameters())
    assert model.config.quantization_config.time_embedding["removed_parameters"] == parameters


@pytest.mark.parametrize("name", [name for name in WITH_TABLE if name != "ControlNet"])
@pytest.mark.parametrize("kind", ["table", "cache"])
def test_a_dequantized_model_computes_its_time_features_again(name, kind):
    model = quantized(build(name), time_embedding=kind)
    expected = {t: call(model, t) for t in (1, 501, 981)}
    model.dequantize()
    for timestep, output in expected.items():
        assert relative_error(call(model, timestep), output) < 1e-3


@pytest.mark.parametrize("kind", ["table", "cache"])
@pytest.mark.parametrize("name", WITHOUT_TABLE)
def test_a_time_embedding_that_knows_more_than_the_time_is_kept_and_said_so(name, kind, caplog):
    with caplog.at_level(logging.WARNING):
        model = quantized(build(name), time_embedding=kind)
    assert model.config.quantization_config.time_embedding["type"] == "keep"
    assert f'The time embedding is kept, not replaced by a "{kind}"' in caplog.text


@pytest.mark.parametrize("name", WITHOUT_TABLE)
def test_keeping_without_being_asked_for_more_is_no_news(name, caplog):
    with caplog.at_level(logging.WARNING):
        model = quantized(build(name))
    assert model.config.quantization_config.time_embedding["type"] == "keep"
    assert "time embedding" not in caplog.text


@pytest.mark.parametrize(("width", "kind"), [(128, "keep"), (704, "table")])
def test_the_default_is_the_smaller_of_table_and_embedding(width, kind):
    model = quantized(tiny_unet(time_embedding_dim=width), recipe=3)
    assert model.config.quantization_config.time_embedding["type"] == kind


def test_kept_time_embeddings_have_the_bits_of_first_and_last_layers():
    model = quantized(build("SDXL"), in_out_bits=7)
    bits = {name: layer["bits"] for name, layer in model.config.quantization_config.layers.items()}
    protected = ("conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2")
    assert {bits[name] for name in protected} == {7}
    assert {b for name, b in bits.items() if name.endswith("time_emb_proj")} == {7}


def test_a_controlnet_too_narrow_to_restore_its_table_stays_whole(tmp_path):
    model = quantized(build("ControlNet"), time_embedding="table")
    expected = call(model)
    with pytest.raises(ValueError, match=r'cannot be turned back .*time_embedding="keep"'):
        model.dequantize()
    assert isinstance(model.conv_in, PackedWeight) and model.is_quantized
    assert torch.equal(call(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(call(ControlNetModel.from_pretrained(tmp_path)), expected)


def test_a_controlnet_with_cached_features_is_restored():
    model = quantized(build("ControlNet"), time_embedding="cache")
    expected = call(model)
    assert relative_error(call(model.dequantize()), expected) < 1e-3


# A quantized ControlNet beside a quantized UNet.


def test_a_quantized_unet_accepts_the_residuals_of_a_quantized_controlnet():
    unet, controlnet = quantized(tiny_unet()), quantized(build("ControlNet"))
    plain = dequantized(unet), dequantized(controlnet)
    torch.manual_seed(0)
    sample, states, image = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32), torch.randn(1, 3, 16, 16)

    def denoise(unet: nn.Module, controlnet: nn.Module) -> Tensor:
        down, mid = controlnet(sample, 501, states, image, return_dict=False)
        return unet(
            sample, 501, states, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample

    with torch.no_grad():
        assert torch.equal(denoise(unet, controlnet), denoise(*plain))
        assert not torch.equal(denoise(unet, controlnet), unet(sample, 501, states).sample)


# Modules that diffusers keeps in fp32.


def tiny_wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()


def test_modules_that_diffusers_keeps_in_fp32_are_neither_packed_nor_cast(tmp_path):
    tiny_wan().save_pretrained(tmp_path / "source")
    config = BitsFusionConfig(target_bits=4)
    model = WanTransformer3DModel.from_pretrained(tmp_path / "source", quantization_config=config, dtype=torch.float16)
    assert model.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert not isinstance(model.condition_embedder.time_embedder.linear_1, PackedWeight)
    assert isinstance(model.blocks[0].ffn.net[2], PackedWeight)
    model.save_pretrained(tmp_path / "packed")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "packed", dtype=torch.float16)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
