"""What a packer refuses before it has changed a model, and which components of a pipeline are quantized."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers import packed_layers
from tiny import tiny_unet

from diffusers_bitsfusion import BitsFusionConfig, quantize_model


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_model_in_a_dtype_that_only_stores_is_refused(dtype):
    unet = tiny_unet().to(dtype)
    with pytest.raises(ValueError, match=f"{dtype}.*Cast the model first"):
        quantize_model(unet, BitsFusionConfig(recipe=2), progress=False)
    assert not packed_layers(unet)
    quantize_model(unet.to(torch.bfloat16), BitsFusionConfig(recipe=2), progress=False)
    assert packed_layers(unet)


def test_a_component_that_does_not_exist_beside_one_that_does_is_refused(source_folder):
    pipe = StableDiffusionPipeline.from_pretrained(source_folder)
    config = BitsFusionConfig(recipe=4, components=["unet", "text_encoder_1"])
    with pytest.raises(ValueError, match=r"no component text_encoder_1 .*it has .*text_encoder, unet"):
        quantize_model(pipe, config, progress=False)
    assert not packed_layers(pipe.unet)


def test_the_default_components_are_alternatives(source_folder):
    pipe = StableDiffusionPipeline.from_pretrained(source_folder)
    assert packed_layers(quantize_model(pipe, BitsFusionConfig(recipe=4), progress=False).unet)
