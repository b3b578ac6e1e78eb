"""Tiny UNets, ControlNets and adapters."""

from __future__ import annotations

import torch

from .case import Case, long, ones, random, time

_UNET = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 16, "cross_attention_dim": 32,
    "attention_head_dim": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
_CONTROL = {key: _UNET[key] for key in _UNET if key != "up_block_types"} | {
    "conditioning_embedding_out_channels": (16, 32)
}


def _blocks(suffix: str) -> dict:
    return _UNET | {
        "down_block_types": (f"CrossAttnDownBlock{suffix}", f"DownBlock{suffix}"),
        "up_block_types": (f"UpBlock{suffix}", f"CrossAttnUpBlock{suffix}"),
    }


def _image(**more):
    return {"sample": random(1, 4, 8, 8), "timestep": time(), "encoder_hidden_states": random(1, 5, 32)} | more


def _video(**more):
    return _image(sample=random(1, 4, 2, 8, 8), **more)


def _motion(adapter, hidden_states):
    """Call the motion modules of an adapter, which a UNet calls between its own layers, one after the other."""
    for block in (*adapter.down_blocks, adapter.mid_block, *adapter.up_blocks):
        for module in block.motion_modules:
            hidden_states = module(hidden_states, num_frames=2)
    return hidden_states


def _control_parts(adapter, sample, temb, text, controlnet_cond):
    """Call what a UNet calls of an adapter before its blocks, and the block in the middle."""
    hint = adapter.control_to_base_for_conv_in(
        adapter.conv_in(sample) + adapter.controlnet_cond_embedding(controlnet_cond)
    )
    joined = torch.cat([hint, hint], dim=1)
    middle = adapter.mid_block.midblock(joined, temb, encoder_hidden_states=text)
    return hint, adapter.mid_block.base_to_ctrl(hint), adapter.mid_block.ctrl_to_base(middle)


CASES = {
    "UNet2DConditionModel": Case(_image, _UNET | {"sample_size": 8}),
    "UNet2DModel": Case(
        lambda: {"sample": random(1, 3, 8, 8), "timestep": time()},
        {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8,
         "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    ),
    "UNet1DModel": Case(
        lambda: {"sample": random(1, 14, 16), "timestep": time(5)},
        {"block_out_channels": (8, 16), "in_channels": 14, "out_channels": 14, "time_embedding_type": "positional",
         "down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D"), "up_block_types": ("UpResnetBlock1D",),
         "mid_block_type": "MidResTemporalBlock1D", "out_block_type": "OutConv1DBlock", "act_fn": "swish",
         "use_timestep_embedding": True, "layers_per_block": 1},
    ),
    "UNet3DConditionModel": Case(_video, _blocks("3D")),
    "I2VGenXLUNet": Case(
        lambda: _video(fps=torch.tensor([8]), image_latents=random(1, 4, 2, 8, 8), image_embeddings=random(1, 32)),
        _blocks("3D"),
    ),
    "UNetMotionModel": Case(
        lambda: _video(encoder_hidden_states=random(2, 5, 32)),
        {key: value for key, value in _blocks("Motion").items() if key != "attention_head_dim"}
        | {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "num_attention_heads": 2,
           "motion_num_attention_heads": 2},
    ),
    "UNetSpatioTemporalConditionModel": Case(
        lambda: _image(sample=random(1, 2, 8, 8, 8), added_time_ids=ones(1, 3)),
        {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32,
         "num_attention_heads": (2, 4), "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24,
         "num_frames": 2,
         "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
         "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")},
    ),
    "Kandinsky3UNet": Case(
        lambda: _image(encoder_attention_mask=ones(1, 5)),
        {"time_embedding_dim": 16, "groups": 4, "attention_head_dim": 8, "layers_per_block": 2,
         "block_out_channels": (16, 32, 32, 32), "cross_attention_dim": 16, "encoder_hid_dim": 32},
        kernel_error=1e-5,
    ),
    "StableCascadeUNet": Case(
        lambda: {"sample": random(1, 4, 8, 8), "timestep_ratio": time(0.5), "clip_text_pooled": random(1, 1, 16)},
        {"in_channels": 4, "out_channels": 4, "conditioning_dim": 16, "block_out_channels": (16, 32),
         "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
         "clip_text_pooled_in_channels": 16, "timestep_ratio_embedding_dim": 16,
         "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2},
    ),
    "ControlNetModel": Case(lambda: _image(controlnet_cond=random(1, 3, 16, 16)), _CONTROL),
    "ControlNetUnionModel": Case(
        lambda: _image(controlnet_cond=[random(1, 3, 16, 16)], control_type=long(1, 0, 0, 0, 0, 0).float(),
                       control_type_idx=[0], conditioning_scale=[1.0]),
        _CONTROL | {"num_trans_channel": 32, "num_trans_head": 2, "num_proj_channel": 32,
                    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 48},
    ),
    "UNetControlNetXSModel": Case(
        lambda: _image(controlnet_cond=random(1, 3, 16, 16), conditioning_scale=1.0),
        {"sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 32,
         "num_attention_heads": 2, "ctrl_block_out_channels": (8, 16), "ctrl_num_attention_heads": 2,
         "ctrl_max_norm_num_groups": 4, "ctrl_conditioning_embedding_out_channels": (8, 8),
         "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
    ),
    "SparseControlNetModel": Case(
        lambda: _video(encoder_hidden_states=random(2, 5, 32), controlnet_cond=random(1, 4, 2, 8, 8),
                       conditioning_mask=ones(1, 1, 2, 8, 8)),
        {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 16, "cross_attention_dim": 32,
         "attention_head_dim": 8, "motion_num_attention_heads": 2,
         "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion")},
    ),
    "T2IAdapter": Case(lambda: {"x": random(1, 3, 64, 64)}, {"channels": [8, 8, 16, 16], "num_res_blocks": 1}),
    "DreamLiteUNetModel": Case(
        lambda: _image(encoder_hidden_states=random(1, 5, 16)),
        {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 16,
         "attention_head_dim": 8, "ff_mult": 2,
         "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
         "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D")},
    ),
    "MotionAdapter": Case(
        lambda: {"hidden_states": random(2, 16, 4, 4)},
        {"block_out_channels": (16, 16), "motion_layers_per_block": 1, "motion_num_attention_heads": 2,
         "motion_norm_num_groups": 8},
        _motion,
    ),
    "ControlNetXSAdapter": Case(
        lambda: {"sample": random(1, 4, 8, 8), "temb": random(1, 64), "text": random(1, 5, 32),
                 "controlnet_cond": random(1, 3, 16, 16)},
        {"block_out_channels": (8, 16), "base_block_out_channels": (16, 16), "cross_attention_dim": 32,
         "conditioning_embedding_out_channels": (8, 8), "num_attention_heads": 2,
         "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
        _control_parts,
    ),
}  # fmt: skip
