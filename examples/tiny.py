"""Tiny models with random weights, built in seconds: they show behaviour, never quality."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}

# What UNets of later families do otherwise, for `tiny_unet`.
SD2 = {"use_linear_projection": True, "attention_head_dim": [4, 8], "cross_attention_dim": 48}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "attention_head_dim": [4, 8],
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def tiny_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """Return a UNet of two levels, with `changes` to `UNET`."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(**(UNET | changes)).eval()


def tiny_controlnet(seed: int = 0) -> ControlNetModel:
    """Return a ControlNet for `tiny_unet`."""
    torch.manual_seed(seed)
    kept = ("block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim", "norm_num_groups")
    config = {key: UNET[key] for key in kept} | {"down_block_types": UNET["down_block_types"]}
    return ControlNetModel(**config, conditioning_embedding_out_channels=(16, 32)).eval()


def tiny_lora(model: nn.Module, targets: tuple[str, ...], rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Return a LoRA in diffusers' format, for layers whose name ends in one of `targets`.

    Its contribution is of the size of the layers' own output.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in model.named_modules():
        name = name.removesuffix(".base_layer")
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name.endswith(targets):
            outputs, *inputs = module.weight.shape
            down = torch.randn(rank, *inputs, generator=generator) / math.sqrt(math.prod(inputs))
            up = torch.randn(outputs, rank, *(1 for _ in inputs[1:]), generator=generator) / math.sqrt(rank)
            state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    assert state
    return state


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return a tokenizer of single letters, whose files are written into `folder`."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "ab", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """Return a VAE that halves the side of images."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        sample_size=16,
    ).eval()


def tiny_pipeline(folder: Path, seed: int = 0, **unet_changes: Any) -> StableDiffusionPipeline:
    """Return a Stable Diffusion pipeline of random weights; the tokenizer's files are written into `folder`."""
    tokenizer = tiny_tokenizer(folder)
    vae = tiny_vae(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=tiny_unet(seed, **unet_changes),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
