"""Tiny image transformers."""

from __future__ import annotations

import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel

from .case import Case, long, ones, random, time

_FLUX = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
_POOLED = _FLUX | {"pooled_projection_dim": 16}
_SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 16,
    "out_channels": 4, "pos_embed_max_size": 8,
}  # fmt: skip
_SANA = {
    "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 8,
    "num_cross_attention_heads": 4, "cross_attention_head_dim": 8, "cross_attention_dim": 32, "caption_channels": 24,
    "sample_size": 8, "patch_size": 1,
}  # fmt: skip
_QWEN = {
    "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
_COGVIEW = {
    "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4,
    "text_embed_dim": 32, "time_embed_dim": 16, "condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8,
}  # fmt: skip
_HUNYUAN = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 8,
    "hidden_size": 16, "cross_attention_dim": 16, "cross_attention_dim_t5": 16, "pooled_projection_dim": 16,
    "text_len": 5, "text_len_t5": 6,
}  # fmt: skip
_Z_IMAGE = {
    "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16,
    "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32],
}  # fmt: skip
_PROTEIN = {
    "nlayers": 2, "token_dim": 32, "nheads": 2, "dim_cond": 16, "pair_repr_dim": 16, "latent_dim": 8,
    "token_type_emb_dim": 8,
}  # fmt: skip


def _flux(**more):
    tokens = {"hidden_states": random(1, 16, 16), "encoder_hidden_states": random(1, 5, 32), "timestep": time(0.5)}
    return tokens | {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)} | more


def _pooled(**more):
    return _flux(pooled_projections=random(1, 16), **more)


def _latents(text: int = 32, **more):
    return {
        "hidden_states": random(1, 4, 8, 8),
        "encoder_hidden_states": random(1, 5, text),
        "timestep": time(),
    } | more


def _qwen(**more):
    tokens = {"hidden_states": random(1, 16, 16), "encoder_hidden_states": random(1, 5, 32), "timestep": time(0.5)}
    return tokens | {"encoder_hidden_states_mask": ones(1, 5).bool(), "img_shapes": [[(1, 4, 4)]]} | more


def _sizes(**more):
    return _latents(original_size=long(16, 16), target_size=long(16, 16), crop_coords=long(0, 0), **more)


def _hunyuan(**more):
    first = {"encoder_hidden_states": random(1, 5, 16), "text_embedding_mask": ones(1, 5)}
    second = {"encoder_hidden_states_t5": random(1, 6, 16), "text_embedding_mask_t5": ones(1, 6)}
    sizes = {"image_meta_size": torch.tensor([[8.0, 8.0, 8.0, 8.0, 0.0, 0.0]]), "style": torch.tensor([0])}
    places = {"image_rotary_emb": (ones(16, 8), torch.zeros(16, 8))}
    return {"hidden_states": random(1, 4, 8, 8), "timestep": time(), **first, **second, **sizes, **places, **more}


def _z_image(**more):
    return {"x": [random(16, 1, 8, 8)], "t": time(0.5), "cap_feats": [random(6, 16)]} | more


def _beside_its_transformer(controlnet, **inputs):
    """Call a ControlNet that shares layers of a transformer, without keeping them: they are not its own."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        transformer = ZImageTransformer2DModel(**_Z_IMAGE).requires_grad_(False)
    controlnet.gradient_checkpointing = False  # which the class reads where gradients are on, and does not have
    own = set(controlnet._modules) | set(controlnet._parameters)
    samples = ZImageControlNetModel.from_transformer(controlnet, transformer)(**inputs)
    for name in {*controlnet._modules, *controlnet._parameters} - own:
        setattr(controlnet, name, None)
    return samples


def _protein(**more):
    everywhere = ones(1, 6).bool()
    told = {"is_in_context_conditioning": ~everywhere, "supports_local_latent": everywhere}
    return {"padding_mask": everywhere, "token_type": torch.zeros(1, 6).long(), "conditioning": told} | more


CASES = {
    "FluxTransformer2DModel": Case(lambda: _pooled(guidance=time(3.5)), _POOLED | {"guidance_embeds": True}),
    "FluxControlNetModel": Case(lambda: _pooled(controlnet_cond=random(1, 16, 16)), _POOLED),
    "Flux2Transformer2DModel": Case(
        lambda: _flux(img_ids=torch.zeros(16, 4), txt_ids=torch.zeros(5, 4), guidance=time(3.5)),
        _FLUX | {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32},
    ),
    "ChromaTransformer2DModel": Case(
        _flux, _FLUX | {"approximator_num_channels": 64, "approximator_hidden_dim": 32, "approximator_layers": 1}
    ),
    "BriaTransformer2DModel": Case(_flux, _FLUX | {"axes_dims_rope": [0, 4, 4], "attention_head_dim": 8}),
    "BriaFiboTransformer2DModel": Case(
        lambda: _flux(text_encoder_layers=[random(1, 5, 16)] * 2), _FLUX | {"text_encoder_dim": 16}
    ),
    "LongCatImageTransformer2DModel": Case(_flux, _POOLED),
    "OvisImageTransformer2DModel": Case(_flux, _FLUX | {"out_channels": 16}),
    "SD3Transformer2DModel": Case(lambda: _latents(pooled_projections=random(1, 16)), _SD3),
    "SD3ControlNetModel": Case(
        lambda: _latents(pooled_projections=random(1, 16), controlnet_cond=random(1, 4, 8, 8)), _SD3
    ),
    "SanaTransformer2DModel": Case(lambda: _latents(24), _SANA),
    "SanaControlNetModel": Case(lambda: _latents(24, controlnet_cond=random(1, 4, 8, 8)), _SANA),
    "QwenImageTransformer2DModel": Case(_qwen, _QWEN),
    "QwenImageControlNetModel": Case(lambda: _qwen(controlnet_cond=random(1, 16, 16)), _QWEN),
    "NucleusMoEImageTransformer2DModel": Case(
        lambda: _qwen(img_shapes=[(1, 4, 4)]),
        _QWEN | {"num_layers": 5, "num_experts": 4, "moe_intermediate_dim": 16, "capacity_factors": 2.0,
                 "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "PixArtTransformer2DModel": Case(
        lambda: _latents(24, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
        {"num_attention_heads": 4, "attention_head_dim": 8, "out_channels": 8, "num_layers": 1,
         "cross_attention_dim": 32, "sample_size": 8, "caption_channels": 24, "use_additional_conditions": False},
    ),
    "DiTTransformer2DModel": Case(
        lambda: {"hidden_states": random(1, 4, 8, 8), "timestep": time().long(), "class_labels": torch.tensor([3])},
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8},
    ),
    "AuraFlowTransformer2DModel": Case(
        lambda: _latents(timestep=time(0.5)),
        {"sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 8,
         "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32, "pos_embed_max_size": 16},
    ),
    "CogView3PlusTransformer2DModel": Case(_sizes, _COGVIEW),
    "CogView4Transformer2DModel": Case(_sizes, _COGVIEW | {"rope_axes_dim": (8, 8)}),
    "Lumina2Transformer2DModel": Case(
        lambda: _latents(encoder_attention_mask=ones(1, 5).bool(), timestep=time(0.5)),
        {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1,
         "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2),
         "axes_lens": (64, 64, 64), "cap_feat_dim": 32},
    ),
    "ZImageTransformer2DModel": Case(_z_image, _Z_IMAGE),
    "HiDreamImageTransformer2DModel": Case(
        lambda: {
            "hidden_states": random(1, 4, 8, 8), "timesteps": time(), "encoder_hidden_states_t5": random(1, 5, 32),
            "encoder_hidden_states_llama3": random(2, 1, 5, 16), "pooled_embeds": random(1, 16),
        },
        {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "attention_head_dim": 8, "num_attention_heads": 4, "caption_channels": [32, 16], "text_emb_dim": 16,
         "axes_dims_rope": (4, 2, 2), "max_resolution": (32, 32), "llama_layers": (0, 1)},
    ),
    "PRXTransformer2DModel": Case(
        lambda: _latents(16, timestep=time(0.5)),
        {"in_channels": 4, "context_in_dim": 16, "hidden_size": 32, "num_heads": 2, "depth": 1, "axes_dim": [8, 8]},
    ),
    "ErnieImageTransformer2DModel": Case(
        lambda: {"hidden_states": random(1, 8, 4, 4), "timestep": time(), "text_bth": random(1, 5, 16),
                 "text_lens": torch.tensor([5])},
        {"hidden_size": 48, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 64, "in_channels": 8,
         "out_channels": 8, "text_in_dim": 16, "rope_axes_dim": (8, 8, 8)},
    ),
    "HunyuanImageTransformer2DModel": Case(
        lambda: _latents(16, encoder_attention_mask=ones(1, 5)),
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
         "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16, "rope_axes_dim": (8, 8)},
    ),
    "PriorTransformer": Case(
        lambda: {"hidden_states": random(1, 16), "timestep": time(), "proj_embedding": random(1, 16),
                 "encoder_hidden_states": random(1, 7, 16)},
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "embedding_dim": 16,
         "num_embeddings": 7},
    ),
    "Transformer2DModel": Case(
        lambda: {"hidden_states": random(1, 16, 8, 8), "encoder_hidden_states": random(1, 5, 16)},
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "norm_num_groups": 8,
         "cross_attention_dim": 16},
    ),
    "UVit2DModel": Case(
        lambda: {"input_ids": torch.zeros(1, 4, 4, dtype=torch.long), "encoder_hidden_states": random(1, 5, 16),
                 "pooled_text_emb": random(1, 16), "micro_conds": ones(1, 5)},
        {"hidden_size": 16, "cond_embed_dim": 16, "micro_cond_encode_dim": 4, "micro_cond_embed_dim": 20,
         "encoder_hidden_size": 16, "vocab_size": 32, "codebook_size": 32, "in_channels": 16,
         "block_out_channels": 16, "num_res_blocks": 1, "downsample": True, "upsample": True, "block_num_heads": 2,
         "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    ),
    "Flux3Transformer2DModel": Case(
        lambda: _flux(img_ids=torch.zeros(16, 4), txt_ids=torch.zeros(5, 4)),
        _FLUX | {"cond_in_channels": 16, "axes_dims_rope": (4, 4, 4, 4), "timestep_channels": 32},
    ),
    "QwenImage21Transformer2DModel": Case(
        lambda: _qwen(img_mask=torch.tensor([[False] * 5 + [True] * 4])),  # a place for every four image tokens
        {"in_channels": 16, "out_channels": 16, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
         "context_in_dim": 32, "axes_dims_rope": (4, 6, 6)},
    ),
    "BriaFibo2Transformer2DModel": Case(
        lambda: _latents(
            encoder_hidden_states=random(1, 2, 5, 16), encoder_attention_mask=ones(1, 5).bool(), timestep=time(0.5)
        ),
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 16,
         "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8,
         "gist_step": 4, "gist_min_text_len": 4, "gist_max_text_len": 8, "axes_dims": (4, 6, 6),
         "axes_lens": (64, 32, 32)},
    ),
    "LuminaNextDiT2DModel": Case(
        lambda: _latents(
            16, timestep=time(0.5), encoder_mask=ones(1, 5), cross_attention_kwargs={},
            image_rotary_emb=torch.ones(4, 4, 4, dtype=torch.complex64),
        ),
        {"sample_size": 8, "hidden_size": 24, "num_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1,
         "multiple_of": 16, "cross_attention_dim": 16},
    ),
    "HunyuanDiT2DModel": Case(_hunyuan, _HUNYUAN | {"num_layers": 2}),
    "HunyuanDiT2DControlNetModel": Case(
        lambda: _hunyuan(controlnet_cond=random(1, 4, 8, 8)), _HUNYUAN | {"transformer_num_layers": 4}
    ),
    "Krea2Transformer2DModel": Case(
        lambda: {"hidden_states": random(1, 16, 16), "encoder_hidden_states": random(1, 5, 2, 16),
                 "timestep": time(0.5), "position_ids": torch.zeros(21, 3)},
        {"in_channels": 16, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 32, "timestep_embed_dim": 32, "text_hidden_dim": 16,
         "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
         "text_intermediate_size": 32, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
         "axes_dims_rope": (4, 6, 6)},
    ),
    "GlmImageTransformer2DModel": Case(
        lambda: _latents(
            16, prior_token_id=long(*range(16)), prior_token_drop=torch.zeros(1, 16, dtype=torch.bool),
            target_size=torch.tensor([[8.0, 8.0]]), crop_coords=torch.zeros(1, 2), timestep=time().long(),
        ),
        {"in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
         "text_embed_dim": 16, "time_embed_dim": 16, "condition_dim": 8, "prior_vq_quantizer_codebook_size": 32},
    ),
    "Ideogram4Transformer2DModel": Case(
        lambda: {"hidden_states": random(1, 9, 16), "timestep": time(0.5), "encoder_hidden_states": random(1, 9, 32),
                 "position_ids": torch.zeros(1, 9, 3, dtype=torch.long), "segment_ids": long(*[0] * 9),
                 "indicator": long(*[3] * 5, *[2] * 4)},
        {"in_channels": 16, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
         "intermediate_size": 32, "adaln_dim": 16, "llm_features_dim": 32, "mrope_section": (4, 2, 2)},
    ),
    "DreamLiteTransformer2DModel": Case(
        lambda: {"hidden_states": random(1, 16, 8, 8), "encoder_hidden_states": random(1, 5, 16)},
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "norm_num_groups": 8,
         "cross_attention_dim": 16},
    ),
    "AnimaTextConditioner": Case(
        lambda: {"source_hidden_states": random(1, 5, 16), "target_input_ids": long(1, 2, 3)},
        {"source_dim": 16, "target_dim": 16, "model_dim": 16, "num_layers": 1, "num_attention_heads": 2,
         "target_vocab_size": 32, "min_sequence_length": 4},
    ),
    "OmniGenTransformer2DModel": Case(
        lambda: _latents(
            input_ids=long(1, 2, 3, 4, 5, 6), input_img_latents=[random(1, 4, 4, 4)], input_image_sizes={0: [[1, 5]]},
            attention_mask=ones(1, 23, 23), position_ids=torch.arange(23)[None],
        ),
        {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32,
         "num_layers": 1, "pad_token_id": 0, "vocab_size": 32, "pos_embed_max_size": 8, "time_step_dim": 16,
         "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "type": "su"}},
        lambda model, encoder_hidden_states, **inputs: model(**inputs),
    ),
    "ZImageControlNetModel": Case(
        lambda: _z_image(control_context=[random(16, 1, 8, 8)]),
        {"control_layers_places": [0], "control_in_dim": 16, "add_control_noise_refiner": "control_noise_refiner",
         "control_refiner_layers_places": [0], "dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
        _beside_its_transformer,
    ),
    "RFD4ProteinaTransformer": Case(
        lambda: _protein(bb_ca=random(1, 6, 3), local_latents=random(1, 6, 8), bb_ca_time=time(0.5),
                         local_latents_time=time(0.5)),
        _PROTEIN | {"cath_emb_dim": 8, "t_emb_dim": 16, "seq_sep_dim": 8, "xt_pair_dist_dim": 6, "tri_mult_c": 16,
                    "num_sequence_classes": 9, "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
                    "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
                    "feats_pair_repr": ("xt_bb_ca_pair_dists",)},
    ),
    "RFD4ProteinaAutoencoder": Case(
        lambda: _protein(z_latent=random(1, 6, 8), ca_coors_nm=random(1, 6, 3)),
        _PROTEIN | {"atom37_mask": [[True] * 37] * 9, "allowed_residue_types": [[True] * 9] * 7,
                    "n_residue_types": 9},
    ),
}  # fmt: skip
