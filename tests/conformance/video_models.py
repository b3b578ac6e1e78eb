"""Tiny video and audio transformers."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

from .case import Case, ones, random, time

_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 32, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 32,
}  # fmt: skip
_COGVIDEO = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 16, "num_layers": 1, "sample_width": 8, "sample_height": 8, "sample_frames": 9,
    "max_text_seq_length": 5,
}  # fmt: skip
_HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": 16,
    "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
}  # fmt: skip
_LTX2 = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
    "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8, "num_layers": 1, "caption_channels": 16,
}  # fmt: skip
_JOY = {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "num_layers": 1,
        "rope_dim_list": [4, 6, 6]}  # fmt: skip


def _video(**more):
    video = {"hidden_states": random(1, 4, 2, 8, 8), "timestep": time(), "encoder_hidden_states": random(1, 5, 16)}
    return video | more


def _frames_first(**more):
    return _video(hidden_states=random(1, 3, 4, 8, 8), **more)


def _hunyuan(**more):
    mask = ones(1, 5)
    return _video(encoder_attention_mask=mask, pooled_projections=random(1, 8), guidance=time(3.5), **more)


def _ltx2():
    video = {"hidden_states": random(1, 16, 4), "num_frames": 2, "height": 2, "width": 4, "timestep": time()}
    sound = {"audio_hidden_states": random(1, 6, 4), "audio_num_frames": 6}
    return (
        video | sound | {name: random(1, 5, 16) for name in ("encoder_hidden_states", "audio_encoder_hidden_states")}
    )


def _without_torchvision(controlnet, **inputs):
    """Call a model that needs torchvision to resize a mask, where nothing has to be resized."""
    resize = SimpleNamespace(functional=mock.Mock(resize=lambda mask, *_, **__: mask), InterpolationMode=mock.Mock())
    with mock.patch.object(controlnet_cosmos, "transforms", resize, create=True):
        return controlnet(**inputs)


CASES = {
    "WanTransformer3DModel": Case(_video, _WAN),
    "ChronoEditTransformer3DModel": Case(_video, _WAN),
    "SkyReelsV2Transformer3DModel": Case(_video, _WAN),
    "WanVACETransformer3DModel": Case(
        lambda: _video(control_hidden_states=random(1, 8, 2, 8, 8), control_hidden_states_scale=ones(1)),
        _WAN | {"vace_layers": [0], "vace_in_channels": 8},
    ),
    "AnyFlowTransformer3DModel": Case(
        lambda: _video(hidden_states=random(1, 2, 4, 8, 8), timestep=time().expand(1, 2),
                       r_timestep=time(100.0).expand(1, 2)),
        _WAN,
    ),
    "LTXVideoTransformer3DModel": Case(
        lambda: _video(hidden_states=random(1, 16, 4), encoder_attention_mask=ones(1, 5), num_frames=2, height=2,
                       width=4),
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
         "cross_attention_dim": 16, "num_layers": 1, "caption_channels": 16},
    ),
    "CogVideoXTransformer3DModel": Case(_frames_first, _COGVIDEO),
    "ConsisIDTransformer3DModel": Case(_frames_first, _COGVIDEO),
    "HunyuanVideoTransformer3DModel": Case(_hunyuan, _HUNYUAN),
    "MochiTransformer3DModel": Case(
        lambda: _video(encoder_attention_mask=ones(1, 5).bool()),
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16,
         "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8, "max_sequence_length": 5},
    ),
    "LatteTransformer3DModel": Case(
        lambda: _video(timestep=time().long()),
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4,
         "cross_attention_dim": 16, "caption_channels": 16, "patch_size": 2, "sample_size": 8, "video_length": 2,
         "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False},
    ),
    "EasyAnimateTransformer3DModel": Case(
        _video,
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2,
         "sample_width": 8, "sample_height": 8, "num_layers": 2, "mmdit_layers": 1, "time_embed_dim": 8,
         "text_embed_dim": 16},
    ),
    "CosmosTransformer3DModel": Case(
        lambda: _video(fps=30),
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
         "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 8, 8), "concat_padding_mask": False},
    ),
    "Kandinsky5Transformer3DModel": Case(
        lambda: _video(
            hidden_states=random(1, 2, 8, 8, 4), pooled_projections=random(1, 8),
            visual_rope_pos=[torch.arange(2), torch.arange(4), torch.arange(4)], text_rope_pos=torch.arange(5),
        ),
        {"in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4,
         "model_dim": 32, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 6, 6)},
    ),
    "SanaVideoTransformer3DModel": Case(
        _video,
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
         "caption_channels": 16, "sample_size": 8, "rope_max_seq_len": 32},
    ),
    "StableAudioDiTModel": Case(
        lambda: {
            "hidden_states": random(1, 4, 8), "timestep": time(0.5), "encoder_hidden_states": random(1, 5, 16),
            "global_hidden_states": random(1, 1, 16),
            "rotary_embedding": (random(9, 4), random(9, 4)),
        },
        {"sample_size": 8, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
         "num_key_value_attention_heads": 2, "out_channels": 4, "cross_attention_dim": 16, "time_proj_dim": 16,
         "global_states_input_dim": 16, "cross_attention_input_dim": 16},
    ),
    "TransformerTemporalModel": Case(
        lambda: {"hidden_states": random(2, 16, 4, 4), "num_frames": 2},
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "norm_num_groups": 8},
    ),
    "T5FilmDecoder": Case(
        lambda: {"encodings_and_masks": [(random(1, 5, 16), ones(1, 5))], "decoder_input_tokens": random(1, 8, 12),
                 "decoder_noise_time": time(0.5)},
        {"input_dims": 12, "targets_length": 8, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32},
    ),
    "HunyuanVideo15Transformer3DModel": Case(
        lambda: _video(
            hidden_states=random(1, 9, 2, 4, 4), encoder_attention_mask=ones(1, 5),
            encoder_hidden_states_2=random(1, 4, 16), encoder_attention_mask_2=ones(1, 4),
            image_embeds=random(1, 3, 16),
        ),
        {"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
         "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 16, "image_embed_dim": 16,
         "rope_axes_dim": (4, 6, 6), "target_size": 16},
    ),
    "AllegroTransformer3DModel": Case(
        lambda: _video(
            timestep=time().long(), encoder_hidden_states=random(1, 1, 5, 16), attention_mask=ones(1, 2, 8, 8),
            encoder_attention_mask=ones(1, 1, 5),
        ),
        {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 1, "cross_attention_dim": 48,
         "sample_height": 8, "sample_width": 8, "sample_frames": 2, "caption_channels": 16},
    ),
    "WanAnimateTransformer3DModel": Case(
        lambda: _video(
            hidden_states=random(1, 12, 6, 8, 8), encoder_hidden_states_image=random(1, 7, 16),
            pose_hidden_states=random(1, 4, 5, 8, 8), face_pixel_values=random(1, 3, 17, 16, 16),
        ),
        _WAN | {"in_channels": 12, "latent_channels": 4, "num_layers": 2, "image_dim": 16, "added_kv_proj_dim": 24,
                "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16,
                "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16,
                "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2},
    ),
    "MotifVideoTransformer3DModel": Case(
        lambda: _video(hidden_states=random(1, 9, 2, 4, 4), encoder_attention_mask=ones(1, 5)),
        {"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
         "num_single_layers": 1, "patch_size": 1, "text_embed_dim": 16, "rope_axes_dim": (4, 6, 6)},
    ),
    "Kandinsky6Transformer3DModel": Case(
        lambda: _video(hidden_states=random(1, 2, 8, 8, 4), pooled_projections=random(1, 8)),
        {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16,
         "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 6, 6),
         "visual_cond": False},
    ),
    "HeliosTransformer3DModel": Case(
        _video,
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
         "freq_dim": 32, "ffn_dim": 32, "num_layers": 1, "rope_dim": (4, 4, 4)},
    ),
    "AceStepTransformer1DModel": Case(
        lambda: {"hidden_states": random(1, 8, 8), "timestep": time(0.5), "timestep_r": time(0.5),
                 "encoder_hidden_states": random(1, 5, 32), "context_latents": random(1, 8, 16)},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "in_channels": 24, "audio_acoustic_hidden_dim": 8,
         "sliding_window": 4},
    ),
    "StableAudio3DiTModel": Case(
        lambda: {"hidden_states": random(1, 8, 8), "timestep": time(0.5), "encoder_hidden_states": random(1, 5, 16),
                 "global_hidden_states": random(1, 16), "local_add_cond": random(1, 3, 8)},
        {"io_channels": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "cond_token_dim": 16, "global_cond_dim": 16,
         "local_add_cond_dim": 3, "timestep_features_dim": 16, "num_memory_tokens": 2},
    ),
    "MiniMaxMusic3Transformer1DModel": Case(
        lambda: {"hidden_states": random(1, 8, 8), "timestep": time(0.5), "encoder_hidden_states": random(1, 8, 16)},
        {"in_channels": 8, "condition_dim": 16, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
         "ff_inner_dim": 32, "rotary_dim": 8, "fourier_embedding_dim": 16},
    ),
    "LongCatAudioDiTTransformer": Case(
        lambda: {"hidden_states": random(1, 8, 8), "encoder_hidden_states": random(1, 5, 16),
                 "encoder_attention_mask": ones(1, 5).bool(), "timestep": time(0.5), "latent_cond": random(1, 8, 8)},
        {"dit_dim": 32, "dit_depth": 1, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 8},
    ),
    "LTX2VideoTransformer3DModel": Case(_ltx2, _LTX2),
    "SanaWMLTX2RefinerTransformer3DModel": Case(
        lambda: _video(hidden_states=random(1, 16, 4), video_rotary_emb=(random(1, 16, 16), random(1, 16, 16))), _LTX2
    ),
    "HunyuanVideoFramepackTransformer3DModel": Case(
        lambda: _hunyuan(
            image_embeds=random(1, 3, 16), indices_latents=torch.tensor([10, 11]),
            latents_clean=random(1, 4, 2, 8, 8), indices_latents_clean=torch.tensor([0, 12]),
            latents_history_2x=random(1, 4, 2, 8, 8), indices_latents_history_2x=torch.tensor([8, 9]),
            latents_history_4x=random(1, 4, 4, 8, 8), indices_latents_history_4x=torch.tensor([4, 5, 6, 7]),
        ),
        _HUNYUAN | {"patch_size": 2, "image_proj_dim": 16, "has_image_proj": True, "has_clean_x_embedder": True},
    ),
    "AnyFlowFARTransformer3DModel": Case(
        lambda: _video(hidden_states=random(1, 2, 4, 8, 8), timestep=time().expand(1, 2),
                       r_timestep=time(100.0).expand(1, 2), chunk_partition=[1, 1]),
        _WAN | {"full_chunk_limit": 1},
    ),
    "WanAnimate2Transformer3DModel": Case(
        lambda: {
            "hidden_states": [random(4, 2, 4, 4)], "condition_latents": [random(4, 2, 4, 4)], "timestep": time(),
            "encoder_hidden_states": [random(5, 16)], "encoder_hidden_states_image": random(1, 3, 1280),
            "kv_cache": WanAnimate2KVCache(1), "kv_cache_mode": "extract", "seq_len": 8,
            "offset_grid_sizes": torch.tensor([[2, 2, 2]]),
        },
        {"text_len": 6, "in_dim": 8, "dim": 24, "ffn_dim": 32, "freq_dim": 32, "text_dim": 16, "out_dim": 4,
         "num_heads": 2, "num_layers": 1},
    ),
    "CosmosControlNetModel": Case(
        lambda: {
            "controls_latents": random(1, 4, 2, 8, 8), "latents": random(1, 4, 2, 8, 8), "timestep": time(0.5),
            "encoder_hidden_states": random(1, 5, 16), "condition_mask": ones(1, 1, 2, 8, 8),
            "padding_mask": torch.zeros(1, 1, 8, 8), "fps": 30,
        },
        {"n_controlnet_blocks": 1, "in_channels": 10, "latent_channels": 6, "model_channels": 32,
         "num_attention_heads": 2, "attention_head_dim": 16, "text_embed_dim": 16, "adaln_lora_dim": 4,
         "max_size": (4, 8, 8), "extra_pos_embed_type": "learnable"},
        _without_torchvision,
    ),
    "Cosmos3OmniTransformer": Case(
        lambda: {
            "input_ids": torch.arange(5), "text_indexes": torch.arange(5), "position_ids": torch.arange(13),
            "und_len": 5, "sequence_length": 13, "vision_tokens": [random(1, 4, 2, 4, 4)],
            "vision_token_shapes": [(2, 2, 2)], "vision_sequence_indexes": torch.arange(5, 13),
            "vision_mse_loss_indexes": torch.arange(5, 13), "vision_timesteps": time().expand(8),
            "vision_noisy_frame_indexes": [torch.arange(2)],
        },
        {"head_dim": 16, "hidden_size": 32, "intermediate_size": 32, "latent_channel": 4, "num_attention_heads": 2,
         "num_hidden_layers": 1, "num_key_value_heads": 1, "patch_latent_dim": 16, "vocab_size": 32,
         "rope_axes_dim": (4, 2, 2)},
    ),
    "JoyImageEditTransformer3DModel": Case(_video, _JOY),
    "JoyImageEditPlusTransformer3DModel": Case(
        lambda: _video(hidden_states=random(1, 8, 4, 1, 2, 2), shape_list=[[(1, 2, 2), (1, 2, 2)]],
                       encoder_hidden_states_mask=ones(1, 5)),
        _JOY,
    ),
    "Kandinsky6SRTransformer3DModel": Case(
        lambda: {"hidden_states": random(1, 2, 8, 8, 9), "timestep": time()},
        {"in_visual_dim": 4, "out_visual_dim": 8, "time_dim": 16, "model_dim": 32, "ff_dim": 32,
         "num_visual_blocks": 1, "axes_dims": (4, 6, 6)},
    ),
    "MiniMaxH3Transformer3DModel": Case(
        lambda: {
            "hidden_states": random(1, 4, 16), "audio_hidden_states": random(1, 3, 8),
            "encoder_hidden_states": random(1, 5, 16), "timestep": time(), "timestep_indices": torch.zeros(12).long(),
            "token_tags": torch.tensor([0] * 5 + [1] * 4 + [2] * 3), "position_ids": torch.zeros(12, 3),
            "text_indices": torch.arange(5), "video_indices": torch.arange(5, 9), "audio_indices": torch.arange(9, 12),
        },
        {"num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 32, "num_layers": 1,
         "num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 8, "text_dim": 16,
         "freq_dim": 32, "time_embed_hidden_dim": 32, "time_embed_dim": 16, "rope_freq_dim": 2},
    ),
    "SanaWMTransformer3DModel": Case(
        lambda: _video(
            encoder_hidden_states=random(1, 1, 5, 16), mask=ones(1, 5), timestep=time().expand(1, 1, 2),
            chunk_plucker=random(1, 6, 2, 8, 8),
        ),
        {"in_channels": 4, "num_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "softmax_every_n": 2,
         "linear_head_dim": 12, "chunk_plucker_channels": 6, "chunk_plucker_post_attn_blocks": 1,
         "caption_channels": 16},
    ),
}  # fmt: skip
