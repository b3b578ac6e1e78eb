"""The model classes of diffusers, and how each is built: tiny for the checks, at its published size for the share."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from typing import Any

import diffusers.models
import torch
from diffusers import ModelMixin
from torch import nn

from diffusers_bitsfusion import BitsFusionConfig
from diffusers_bitsfusion.packing.planning import make_plan
from diffusers_bitsfusion.utils.private_names import DIFFUSERS_FP32

from . import audio_models, autoencoders, image_models, unets, video_models
from .case import Case

CASES: dict[str, Case] = {
    **image_models.CASES, **video_models.CASES, **unets.CASES, **autoencoders.CASES, **audio_models.CASES,
}  # fmt: skip

# Classes without weights of their own: they hold several models, each of which is quantized by itself.
CONTAINERS = (
    "FluxMultiControlNetModel", "HunyuanDiT2DMultiControlNetModel", "MultiAdapter", "MultiControlNetModel",
    "MultiControlNetUnionModel", "QwenImageMultiControlNetModel", "SD3MultiControlNetModel",
)  # fmt: skip
_BASES = ("ModelMixin", "LegacyModelMixin")

# Arguments that classes have no default for, or defaults that do not build.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 64,
        "block_out_channels": (128, 256, 512, 512, 1024, 1024),
        "layers_per_block": 2, "spatial_compression_ratio": 32, "sample_size": 384,
    },
    "ControlNetUnionModel": {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
    "DreamLiteTransformer2DModel": {"in_channels": 320, "cross_attention_dim": 2048},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [4096, 4096],
        "llama_layers": tuple(range(48)),
    },
    "HunyuanDiT2DControlNetModel": {"in_channels": 4, "patch_size": 2},
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2},
    "LatteTransformer3DModel": {
        "in_channels": 4, "out_channels": 8, "patch_size": 2, "num_layers": 28, "attention_head_dim": 72,
        "cross_attention_dim": 1152, "caption_channels": 4096, "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "OmniGenTransformer2DModel": {
        "rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "type": "su"},
    },
    "RFD4ProteinaAutoencoder": {"atom37_mask": [[True] * 37] * 147, "allowed_residue_types": [[True] * 147] * 7},
    "Transformer2DModel": {"in_channels": 320, "cross_attention_dim": 768},
    "TransformerTemporalModel": {"in_channels": 320},
    "ZImageControlNetModel": {
        "control_layers_places": [0, 5, 10, 15, 20, 25], "control_in_dim": 16, "control_refiner_layers_places": [0, 1],
    },
}  # fmt: skip


def classes() -> list[str]:
    """Return the names of all model classes of diffusers with weights of their own, in order."""
    found: set[str] = set()
    for info in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        try:
            module = importlib.import_module(info.name)
        except ImportError:  # of a framework that is not installed
            continue
        members = inspect.getmembers(module, inspect.isclass)
        found |= {name for name, kind in members if issubclass(kind, ModelMixin) and hasattr(diffusers, name)}
    return sorted(found.difference(CONTAINERS, _BASES))


def published(name: str) -> nn.Module:
    """Return a class at the size that its defaults give, without weights."""
    with torch.device("meta"):
        return getattr(diffusers, name)(**_PUBLISHED.get(name, {}))


@dataclass(frozen=True)
class Shares:
    """Shares of all parameters of a class at its default size, biases and norms included.

    Attributes:
        packed: those whose values are packed.
        embeddings: tables of embeddings, which are packed with `embeddings=True`.
        fp32: those in modules that the class keeps in fp32, which no quantizer of diffusers touches.
    """

    packed: float
    embeddings: float
    fp32: float


def shares(name: str) -> Shares:
    """Return what becomes of the parameters of a class at its default size."""
    model = published(name)
    kept = DIFFUSERS_FP32.read(model) or []
    packed, with_embeddings = (_share_packed(model, kept, embeddings) for embeddings in (False, True))
    return Shares(packed, with_embeddings - packed, _share_packed(model, [], True) - with_embeddings)


def _share_packed(model: nn.Module, kept: list[str], embeddings: bool) -> float:
    config = BitsFusionConfig(recipe=2, time_embedding="keep", embeddings=embeddings)
    try:
        plan = make_plan(model, config, kept)
    except ValueError:  # All of it is kept.
        return 0.0
    packed = sum(layer.rows * layer.columns for layer in plan.schema(model).layers.values())
    return packed / sum(parameter.numel() for parameter in model.parameters())
