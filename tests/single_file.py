"""A tiny pipeline as a single file of the original Stable Diffusion, for tests of what reads such files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import tiny_pipeline

LDM_UNET = {
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTSIDE_BLOCKS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def ldm_unet_name(name: str, layers: int) -> str:
    """The original name of a diffusers UNet tensor."""
    module, _, kind = name.rpartition(".")
    if module in OUTSIDE_BLOCKS:
        return f"{OUTSIDE_BLOCKS[module]}.{kind}"
    side, *rest = name.split(".")
    if side == "mid_block":
        part, index, *rest = rest
        block = f"middle_block.{2 * int(index) if part == 'resnets' else 1}"
        level = index
    else:
        level, part, index, *rest = rest
        per_level = layers + 1
        if side == "down_blocks":
            position = int(level) * per_level + (layers if part == "downsamplers" else int(index)) + 1
            block = f"input_blocks.{position}"
        else:
            position = int(level) * per_level + (layers if part == "upsamplers" else int(index))
            block = f"output_blocks.{position}"
        # Up-samplers follow the attention of their block, or its ResBlock where the level has no attention.
        slot = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 if level == "0" else 2}[part]
        block = f"{block}.{slot}"
    if part == "resnets":
        rest[0] = RESNET[rest[0]]
    if part == "downsamplers":
        rest[0] = "op"
    return ".".join([block, *rest])


def ldm_vae_tensors(state_dict: dict[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """Tensors of an AutoencoderKL under their original names, attention as 1x1 convolutions."""
    tensors = {}
    for name, tensor in state_dict.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = new.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        for level in range(levels):
            for side, old in (("down", level), ("up", levels - 1 - level)):
                new = new.replace(f"{side}_blocks.{level}.resnets", f"{side}.{old}.block")
                new = new.replace(f"{side}_blocks.{level}.{side}samplers.0", f"{side}.{old}.{side}sample")
        if "mid_block.attentions.0" in new:
            part, _, kind = new.partition("mid_block.attentions.0.")[2].rpartition(".")
            new = new.partition("mid_block.")[0] + f"mid.attn_1.{VAE_ATTENTION[part]}.{kind}"
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        tensors[new] = tensor
    return tensors


def write_single_file(folder: Path, tokenizer: Path, file: Path) -> None:
    """Save a tiny pipeline in `folder`, and the same weights under their original names in `file`."""
    pipe = tiny_pipeline(tokenizer, **LDM_UNET)
    pipe.save_pretrained(folder)
    tensors = {
        "model.diffusion_model." + ldm_unet_name(name, LDM_UNET["layers_per_block"]): tensor
        for name, tensor in pipe.unet.state_dict().items()
    }
    vae = ldm_vae_tensors(pipe.vae.state_dict(), levels=2)
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    for name, tensor in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
