"""Tiny autoencoders of images, videos and sound."""

from __future__ import annotations

from .case import Case, random

_KL = {
    "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
_CAUSAL = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
_HUNYUAN = {"latent_channels": 8, "block_out_channels": (32,) * 5, "layers_per_block": 1}
_STATISTICS = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


def _picture(size: int = 16):
    return {"sample": random(1, 3, size, size)}


def _video(frames: int = 5, size: int = 16):
    return {"sample": random(1, 3, frames, size, size)}


def _in_one_tile(model, sample):
    """Call an autoencoder that knows tiles only, with one tile of the size of the video."""
    model.enable_tiling()
    model.kernel = model.stride = tuple(sample.shape[2:])
    return model(sample)


CASES = {
    "AutoencoderKL": Case(_picture, _KL),
    "AutoencoderKLFlux2": Case(_picture, _KL | {"latent_channels": 4}),
    "AsymmetricAutoencoderKL": Case(
        _picture,
        {"down_block_types": ("DownEncoderBlock2D",), "down_block_out_channels": (8,), "up_block_out_channels": (8,),
         "up_block_types": ("UpDecoderBlock2D",), "norm_num_groups": 4},
    ),
    "VQModel": Case(_picture, _KL),
    "AutoencoderTiny": Case(
        _picture,
        {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
         "num_decoder_blocks": (1, 1)},
    ),
    "AutoencoderDC": Case(
        _picture,
        {"latent_channels": 4, "attention_head_dim": 2, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
         "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8),
         "decoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
         "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)),
         "downsample_block_type": "Conv", "upsample_block_type": "interpolate"},
    ),
    "AutoencoderKLTemporalDecoder": Case(
        lambda: _picture() | {"num_frames": 1},
        {"block_out_channels": (32,), "down_block_types": ("DownEncoderBlock2D",), "latent_channels": 4},
    ),
    "AutoencoderKLWan": Case(_video, _CAUSAL | _STATISTICS),
    "AutoencoderKLQwenImage": Case(_video, _CAUSAL | _STATISTICS),
    "AutoencoderKLCogVideoX": Case(
        _video,
        {"block_out_channels": (8, 8), "down_block_types": ("CogVideoXDownBlock3D",) * 2, "latent_channels": 4,
         "up_block_types": ("CogVideoXUpBlock3D",) * 2, "layers_per_block": 1, "norm_num_groups": 2,
         "temporal_compression_ratio": 2},
    ),
    "AutoencoderKLHunyuanVideo": Case(
        _video,
        {"block_out_channels": (8, 8, 8, 8), "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
         "up_block_types": ("HunyuanVideoUpBlock3D",) * 4, "layers_per_block": 1, "norm_num_groups": 4,
         "latent_channels": 4},
    ),
    "AutoencoderKLMagvit": Case(
        _video,
        {"block_out_channels": [8, 8], "down_block_types": ["SpatialDownBlock3D", "SpatialTemporalDownBlock3D"],
         "up_block_types": ["SpatialUpBlock3D", "SpatialTemporalUpBlock3D"], "layers_per_block": 1,
         "norm_num_groups": 4, "latent_channels": 4, "spatial_group_norm": False},
    ),
    "AutoencoderKLLTXVideo": Case(
        lambda: _video(9, 32),
        {"latent_channels": 8, "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8),
         "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5},
    ),
    "AutoencoderKLCosmos": Case(
        lambda: _video(9, 32),
        {"latent_channels": 4, "encoder_block_out_channels": (8, 8), "decode_block_out_channels": (8, 8),
         "attention_resolutions": (8,), "resolution": 64, "num_layers": 1, "spatial_compression_ratio": 4,
         "temporal_compression_ratio": 4},
    ),
    "AutoencoderOobleck": Case(
        lambda: {"sample": random(1, 2, 32)},
        {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "channel_multiples": [1, 2], "decoder_channels": 8,
         "decoder_input_channels": 4, "audio_channels": 2},
    ),
    "AutoencoderKLQwenImage21": Case(
        lambda: {"sample": random(1, 4, 1, 16, 16)}, _CAUSAL | _STATISTICS | {"decoder_base_dim": 4}
    ),
    "AutoencoderKLMochi": Case(
        lambda: _video(7),
        {"latent_channels": 4, "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4,
         "layers_per_block": (1,) * 5, "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4},
    ),
    "AutoencoderKLHunyuanImage": Case(
        _picture,
        {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 64),
         "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 16},
    ),
    "AutoencoderKLHunyuanVideo15": Case(_video, _HUNYUAN),
    "AutoencoderKLHunyuanImageRefiner": Case(_video, _HUNYUAN),
    "AutoencoderKLKVAE": Case(
        _picture, {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2)}
    ),
    "AutoencoderVidTok": Case(
        lambda: _video() | {"sample_posterior": False}, {"ch": 8, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    ),
    "ConsistencyDecoderVAE": Case(
        _picture,
        {"encoder_block_out_channels": (8, 8), "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
         "encoder_layers_per_block": 1, "encoder_norm_num_groups": 4, "decoder_block_out_channels": (8, 8),
         "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2, "decoder_layers_per_block": 1,
         "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2, "decoder_norm_num_groups": 4},
    ),
    "AutoencoderKLLTX2Audio": Case(
        lambda: {"sample": random(1, 2, 16, 16)},
        {"base_channels": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "latent_channels": 4, "mel_bins": 16},
    ),
    "AutoencoderSAME": Case(
        lambda: {"sample": random(1, 2, 64)},
        {"patch_size": 8, "encoder_channels": 8, "encoder_c_mults": (2,), "encoder_strides": (4,),
         "encoder_transformer_depths": (1,), "latent_dim": 8, "dim_heads": 8},
    ),
    "AutoencoderKLAllegro": Case(
        lambda: _video(8),
        {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2},
        _in_one_tile,
    ),
    "AutoencoderKLKVAEVideo": Case(
        _video, {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4, "temporal_compress_times": 2}
    ),
    "AutoencoderKLLTX2Video": Case(
        lambda: _video(9, 64),
        {"latent_channels": 8, "block_out_channels": (8, 16, 32, 64), "decoder_block_out_channels": (8, 16, 32),
         "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 4},
    ),
    "AutoencoderKLMiniMaxH3": Case(
        lambda: _video(10),
        {"latent_channels": 4, "block_out_channels": (8, 8), "layers_per_block": 1,
         "spatial_downsample_factors": (2, 2), "temporal_downsample_factors": (1, 2), "norm_num_groups": 4,
         "decoder_num_layers": 1, "decoder_num_attention_heads": 2, "decoder_attention_head_dim": 16,
         "decoder_ffn_mult": 2, "clip_length": 5, "token_drop": 1, "latents_mean": (0.0,) * 4,
         "latents_std": (1.0,) * 4},
    ),
    "AutoencoderRAE": Case(
        lambda: _picture(28),
        {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "decoder_hidden_size": 32,
         "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32,
         "patch_size": 4, "encoder_input_size": 28},
    ),
    "Kandinsky6SRVAE": Case(
        _video,
        {"latent_channels": 4, "encoder_block_out_channels": (4, 8, 8), "decoder_block_out_channels": (4, 8, 8),
         "layers_per_block": 1},
    ),
    "Kandinsky6SRLatentUpscalerBank": Case(
        lambda: {"latents": random(1, 4, 2, 4, 4), "scale": 4},
        {"in_channels": 4, "stage_channels": (32, 32, 32), "num_pre_blocks": 1, "num_mid_blocks": 1,
         "num_post_blocks": 1, "num_x2_adapter_blocks": 1},
    ),
    "LTX2VideoDiffusionDecoderModel": Case(
        lambda: {"z": random(1, 8, 2, 4, 4)},
        {"latent_channels": 8, "decoder_head_dim": 16, "decoder_stage_channels": (32, 32),
         "decoder_stage_depths": (1, 1), "decoder_stage_kernels": ((1, 3, 3),),
         "decoder_upsample_strides": ((2, 2, 2),), "decoder_upsample_channel_reductions": (1,),
         "decoder_stage5_kernel": (3, 3, 3), "decoder_t_emb_dim": 16,
         "spatial_compression_ratio": 8, "temporal_compression_ratio": 2},
    ),
}  # fmt: skip
