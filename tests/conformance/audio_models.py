"""Tiny models of sound: autoencoders, vocoders and what stands beside a transformer of music."""

from __future__ import annotations

from .case import Case, random

CASES = {
    "AutoencoderKLKVAEAudio": Case(
        lambda: {"sample": random(1, 1, 32)},
        {"encoder_dim": 8, "encoder_rates": [2, 4], "latent_dim": 32, "codebook_dim": 8, "decoder_dim": 32,
         "decoder_rates": [4, 2], "attn_num_heads": 2},
    ),
    "Cosmos3AVAEAudioTokenizer": Case(
        lambda: {"sample": random(1, 2, 128)},
        {"vocoder_input_dim": 8, "dec_dim": 8, "dec_c_mults": (1, 2), "dec_strides": (4, 4), "enc_dim": 8,
         "enc_num_blocks": 1, "enc_n_fft": 16, "enc_hop_length": 4, "enc_latent_dim": 16, "enc_c_mults": (1,),
         "enc_strides": (4,)},
    ),
    "LongCatAudioDiTVae": Case(
        lambda: {"sample": random(1, 1, 64)},
        {"channels": 8, "c_mults": [1, 2], "strides": [2, 4], "latent_dim": 8, "encoder_latent_dim": 16,
         "downsampling_ratio": 8},
    ),
    "MMAudioVAE": Case(
        lambda: {"sample": random(1, 64)},
        {"mel_bins": 8, "latent_channels": 4, "hidden_channels": 16, "channel_multipliers": (1, 2),
         "layers_per_block": 1, "n_fft": 32, "hop_length": 8},
    ),
    "MMAudioVocoder": Case(
        lambda: {"mel": random(1, 16, 8)},
        {"num_mels": 16, "upsample_initial_channel": 16, "upsample_rates": (4, 2), "upsample_kernel_sizes": (8, 4),
         "resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1, 3, 5),)},
    ),
    "MiniMaxMusic3ConditionEncoder": Case(
        lambda: {"hidden_states": random(1, 8, 32)},
        {"condition_hidden_dim": 16, "num_condition_layers": 2, "out_dim": 16},
    ),
    "MiniMaxMusic3RVQDepthDecoder": Case(
        lambda: {"inputs_embeds": random(1, 4, 32)},
        {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
         "audio_vocab_size": 16, "num_codebooks": 3},
    ),
    "MiniMaxMusic3Vocoder": Case(
        lambda: {"latents": random(1, 16, 8)},
        {"latent_channels": 16, "decoder_input_dim": 16, "decoder_hidden_dim": 16, "upsampling_ratios": (4, 2)},
    ),
}  # fmt: skip
