"""What diffusers makes from a packed model or pipeline: plain models by its config, pipelines of its parts."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from tiny import tiny_unet
from tiny_transformers import tiny_flux

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.nn import BitsFusionConv2d

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("saved", [False, True])
def test_a_model_made_from_a_packed_config_is_plain(packed_unet, tmp_path, call_unet, saved):
    if saved:
        packed_unet.save_pretrained(tmp_path / "packed")
        packed_unet = UNet2DConditionModel.from_pretrained(tmp_path / "packed")
    plain = UNet2DConditionModel.from_config(packed_unet.config)
    assert "quantization_config" not in plain.config and "_pre_quantization_dtype" not in plain.config
    assert "quantization_config" in packed_unet.config
    plain.save_pretrained(tmp_path / "plain")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "plain")
    assert not isinstance(again.conv_in, BitsFusionConv2d)
    assert torch.equal(call_unet(again), call_unet(plain))
    quantize_model(plain, BitsFusionConfig(recipe=2), progress=False)


COPIES = {
    "ControlNet": (ControlNetModel.from_unet, tiny_unet),
    "AnimateDiff": (UNetMotionModel.from_unet2d, tiny_unet),
    "Flux ControlNet": (FluxControlNetModel.from_transformer, tiny_flux),
}


@pytest.mark.parametrize(("copying", "build"), COPIES.values(), ids=COPIES)
def test_a_model_that_would_copy_packed_weights_is_refused(copying, build):
    config = {"attention_head_dim": 16, "num_attention_heads": 2} if build is tiny_flux else {}
    packed = quantize_model(build(), BitsFusionConfig(recipe=2), progress=False)
    with pytest.raises(ValueError, match=r"copies weights.* are packed\. Call `dequantize\(\)`"):
        copying(packed)
    plain = copy.deepcopy(packed).dequantize()
    if build is tiny_unet:
        made = copying(plain, **config)
        assert torch.equal(made.conv_in.weight, plain.conv_in.weight)


def test_a_controlnet_without_copied_weights_needs_none(packed_unet):
    made = ControlNetModel.from_unet(packed_unet, load_weights_from_unet=False)
    assert "quantization_config" not in made.config


@pytest.mark.parametrize("arguments", [{}, {"dtype": None}], ids=["none", "None"])
def test_from_pipe_keeps_the_dtype_of_every_part(packed_folders, arguments):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["table"], dtype=torch.bfloat16)
    pipe.vae.to(torch.float32)
    made = StableDiffusionImg2ImgPipeline.from_pipe(pipe, **arguments)
    assert made.vae.dtype == torch.float32 and made.unet is pipe.unet
    assert made.unet.dtype == made.text_encoder.dtype == torch.bfloat16
    made.text_encoder.to(torch.float32)
    StableDiffusionPipeline.from_pipe(made)
    assert made.text_encoder.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype"):
        made.to(torch.float16)
    assert {made.vae.dtype, made.text_encoder.dtype} == {torch.float32}
