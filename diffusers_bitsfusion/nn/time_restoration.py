"""An ordinary time path fitted to looked-up features, where a model is dequantized."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from .conversion import replace_module
from .time_features import TimeFeatureSlice

# Width of the MLP that is fitted to a table: enough to pass through 1000 timesteps.
_WIDTH = 1280
_SEED = 0
_TOLERANCE = 0.01


@torch.no_grad()
def restore(model: ModelMixin, dtype: torch.dtype) -> None:
    """Put an ordinary time path back in, fitted to the features that the look-up holds.

    The original MLP is gone, but a plain model needs one. A layer of fixed random weights, as wide as the timesteps
    are many, has features rich enough that a layer after it, fitted by least squares, reproduces any values on every
    kept timestep (relative error about 1e-5). A table with the time embedding gets that embedding back, which adapters
    of the blocks' projections were trained for; else the embedding is another, and the projections alone are fitted.

    Raises:
        ValueError: the fit misses the features by more than 1 % (a ControlNet too narrow for its timesteps); or the
            time embedding cannot be given back, and projections have adapters. Nothing has changed then.
    """
    lookup = model.time_proj
    slices = {name: module for name, module in model.named_modules() if isinstance(module, TimeFeatureSlice)}
    timesteps, features = (t.cpu() for t in lookup.features())
    if lookup.embedding_width:
        _add_branches(features, F.silu(lookup.embedding().cpu()), slices)
    channels = model.config.block_out_channels[0]
    proj = Timesteps(channels, model.config.flip_sin_to_cos, model.config.freq_shift)
    width = model.config.get("time_embedding_dim") or 4 * channels
    known = lookup.embedding_width >= len(timesteps)
    if not known and any(name.endswith(".base_layer") for name in slices):
        raise ValueError(
            f"The time embedding of {len(timesteps)} timesteps cannot be given back in its width {width}, which the "
            "adapters of time_emb_proj need. Call `unload_lora_weights()` before `dequantize()`, after `fuse_lora()` "
            "if they are to stay in the weights."
        )
    # A UNet too narrow to pass through all its timesteps is given a wider time embedding; a ControlNet cannot be.
    widened = isinstance(model, UNet2DConditionModel) and len(timesteps) > width // 2 and width < _WIDTH
    width = _WIDTH if widened else width
    embedding = _random_embedding(channels, width)
    if known:
        hidden = embedding.act(embedding.linear_1(proj(timesteps)))
        _set(embedding.linear_2, *_fit(hidden, lookup.embedding().cpu()))
    embedding = embedding.to(dtype).float()  # What follows is fitted to the rounded weights.
    hidden = F.silu(embedding(proj(timesteps)))
    weight, bias = _fit(hidden, features)
    error = float((hidden.double() @ weight.T + bias - features).norm() / features.norm().clamp_min(1e-12))
    if error > _TOLERANCE:
        raise ValueError(
            f"The time features of {len(timesteps)} timesteps cannot be turned back into a time embedding of width "
            f'{width} (relative error {error:.2%}). Quantize with time_embedding="keep" to dequantize this model.'
        )

    if widened:
        model.register_to_config(time_embedding_dim=width)
    model.time_proj, model.time_embedding = proj, embedding.to(lookup.device, dtype)
    for name, part in slices.items():
        projection = nn.Linear(width, part.out_features, device=lookup.device, dtype=dtype)
        _set(projection, weight[part.start : part.stop], bias[part.start : part.stop])
        replace_module(model, name, projection)
    for block in model.modules():
        if isinstance(block, ResnetBlock2D):
            block.skip_time_act = False


def _add_branches(features: Tensor, embedding: Tensor, slices: dict[str, TimeFeatureSlice]) -> None:
    """Add to the features [timesteps, all] what branches compute from silu(time_embedding(t)) [timesteps, width]."""
    for part in slices.values():
        if part.branch_rank:
            down, up = part.branch_down.cpu().float(), part.branch_up.cpu().float()
            features[:, part.start : part.stop] += embedding @ down.T @ up.T


def _random_embedding(channels: int, width: int) -> TimestepEmbedding:
    embedding = TimestepEmbedding(channels, width, act_fn="silu")
    generator = torch.Generator().manual_seed(_SEED)
    for layer, gain in ((embedding.linear_1, 2.0), (embedding.linear_2, 1.0)):
        nn.init.normal_(layer.weight, std=math.sqrt(gain / layer.in_features), generator=generator)
        nn.init.normal_(layer.bias, std=0.5, generator=generator)
    return embedding


def _fit(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight fp64 [out, in] and bias fp64 [out] of a layer from inputs [n, in] to targets [n, out]."""
    inputs = torch.cat([inputs.double(), torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    gram = inputs.T @ inputs
    gram.diagonal().add_(1e-9 * gram.trace() / len(gram))
    fitted = torch.linalg.solve(gram, inputs.T @ targets.double())
    return fitted[:-1].T, fitted[-1]


def _set(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
