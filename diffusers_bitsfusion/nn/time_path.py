"""The time path of a UNet or ControlNet: where it is, what it computes, taking it out and putting it back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, ModelMixin, UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..codec.schema import TimeFeaturesSchema
from .time_features import TimeFeatureCache, TimeFeaturePassThrough, TimeFeatures, TimeFeatureSlice, TimeFeatureTable

# Width of the MLP that `restore` fits to a table: enough to pass through 1000 timesteps.
_RESTORED_WIDTH = 1280
_RESTORED_SEED = 0
_RESTORED_TOLERANCE = 0.01


def why_not_cacheable(model: ModelMixin) -> str | None:
    """Why the model's time features depend on more than the timestep, or None when they do not."""
    if not isinstance(model, (UNet2DConditionModel, ControlNetModel)):
        return f"{type(model).__name__} has no ResBlock time projections"
    if not isinstance(model.time_proj, Timesteps) or not isinstance(model.time_embedding, TimestepEmbedding):
        return "its time embedding is not the sinusoidal one"
    if model.time_embedding.cond_proj is not None:
        return "its time embedding depends on a condition (time_cond_proj_dim)"
    if model.class_embedding is not None:
        return "its time embedding depends on a class (class_embedding)"
    if getattr(model, "add_embedding", None) is not None:
        return "its time embedding depends on the prompt (add_embedding)"
    if model.config.get("time_embedding_act_fn") is not None or model.time_embedding.post_act is not None:
        return "its time embedding has a further activation"
    for name, block in model.named_modules():
        if hasattr(block, "time_emb_proj") and not _is_plain_block(block):
            return f"the time projection of {name} is not the plain one"
    return None


def _is_plain_block(block: nn.Module) -> bool:
    return (
        isinstance(block, ResnetBlock2D)
        and isinstance(block.time_emb_proj, nn.Linear)
        and block.time_embedding_norm in ("default", "scale_shift")
        and isinstance(block.nonlinearity, nn.SiLU)
        and not block.skip_time_act
    )


@dataclass
class TimePath:
    """Modules that turn a timestep into the features of each ResBlock, in the order of `named_modules`."""

    model: ModelMixin
    blocks: dict[str, ResnetBlock2D]

    @classmethod
    def find(cls, model: ModelMixin) -> TimePath | None:
        """Return the time path of a model, or None where `why_not_cacheable` gives a reason."""
        if why_not_cacheable(model) is not None:
            return None
        return cls(model, {name: m for name, m in model.named_modules() if isinstance(m, ResnetBlock2D)})

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """Linear layers of the path by module name."""
        embedding = self.model.time_embedding
        projections = {f"{name}.time_emb_proj": block.time_emb_proj for name, block in self.blocks.items()}
        return {
            "time_embedding.linear_1": embedding.linear_1,
            "time_embedding.linear_2": embedding.linear_2,
            **projections,
        }

    @property
    def sizes(self) -> list[tuple[str, int]]:
        """(block name, number of features) in order; the features of all blocks lie side by side."""
        return [(name, block.time_emb_proj.out_features) for name, block in self.blocks.items()]

    @property
    def num_weights(self) -> int:
        """Weights (without biases) that taking the path out removes."""
        return sum(layer.weight.numel() for layer in self.layers.values())

    @property
    def num_parameters(self) -> int:
        """Parameters that taking the path out removes."""
        return sum(p.numel() for layer in self.layers.values() for p in layer.parameters())

    @torch.no_grad()
    def compute(self, timesteps: Tensor) -> Iterator[Tensor]:
        """Exact features of one block after another, fp32 [timesteps, size], computed in fp32."""
        layers = self.layers

        def linear(name: str, x: Tensor) -> Tensor:
            layer = layers[name]
            x = x.to(layer.weight.device)  # a model may be spread over several
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())

        device = layers["time_embedding.linear_1"].weight.device
        hidden = self.model.time_proj(timesteps.to(device)).float()
        hidden = self.model.time_embedding.act(linear("time_embedding.linear_1", hidden))
        hidden = F.silu(linear("time_embedding.linear_2", hidden))
        for name in self.blocks:
            yield linear(f"{name}.time_emb_proj", hidden).to(device)


def install(model: ModelMixin, lookup: TimeFeatures, sizes: Iterable[tuple[str, int]]) -> None:
    """Replace the time path of `model` by `lookup`, whose features belong to the blocks of `sizes` in order."""
    model.time_proj = lookup
    model.time_embedding = TimeFeaturePassThrough()
    start = 0
    for name, size in sizes:
        block = model.get_submodule(name)
        block.time_emb_proj = TimeFeatureSlice(start, start + size)
        block.skip_time_act = True  # the features are those after the activation
        start += size


@torch.no_grad()
def restore(model: ModelMixin, dtype: torch.dtype) -> None:
    """Put an ordinary time path back in, fitted to the features that the look-up holds.

    The original MLP is gone, but a plain model needs one. A two-layer MLP of fixed random weights, as wide as the
    timesteps are many, has features rich enough that the blocks' projections, fitted by least squares, reproduce
    the kept values on every kept timestep (relative error about 1e-5).

    Raises:
        ValueError: the fit misses the features by more than 1 % (a ControlNet too narrow for its timesteps).
    """
    lookup = model.time_proj
    timesteps, features = (t.cpu() for t in lookup.features())
    device = next(lookup.parameters()).device
    channels = model.config.block_out_channels[0]
    width = model.config.get("time_embedding_dim") or 4 * channels
    # A UNet too narrow to pass through all its timesteps is given a wider time embedding; a ControlNet cannot be.
    widened = isinstance(model, UNet2DConditionModel) and len(timesteps) > width // 2 and width < _RESTORED_WIDTH
    width = _RESTORED_WIDTH if widened else width

    proj = Timesteps(channels, model.config.flip_sin_to_cos, model.config.freq_shift)
    embedding = TimestepEmbedding(channels, width, act_fn="silu")
    generator = torch.Generator().manual_seed(_RESTORED_SEED)
    for layer, gain in ((embedding.linear_1, 2.0), (embedding.linear_2, 1.0)):
        nn.init.normal_(layer.weight, std=math.sqrt(gain / layer.in_features), generator=generator)
        nn.init.normal_(layer.bias, std=0.5, generator=generator)
    hidden = F.silu(embedding(proj(timesteps))).double()
    hidden = torch.cat([hidden, torch.ones(len(hidden), 1, dtype=torch.float64)], dim=1)
    gram = hidden.T @ hidden
    gram.diagonal().add_(1e-9 * gram.trace() / len(gram))
    fitted = torch.linalg.solve(gram, hidden.T @ features.double())
    error = float((hidden @ fitted - features).norm() / features.norm().clamp_min(1e-12))
    if error > _RESTORED_TOLERANCE:
        raise ValueError(
            f"The time features of {len(timesteps)} timesteps cannot be turned back into a time embedding of width "
            f'{width} (relative error {error:.2%}). Quantize with time_embedding="keep" to dequantize this model.'
        )

    if widened:
        model.register_to_config(time_embedding_dim=width)
    model.time_proj, model.time_embedding = proj, embedding.to(device, dtype)
    for block in model.modules():
        if isinstance(block, ResnetBlock2D):
            part = slice(block.time_emb_proj.start, block.time_emb_proj.stop)
            projection = nn.Linear(width, part.stop - part.start, device=device, dtype=dtype)
            projection.weight.copy_(fitted[:-1, part].T)
            projection.bias.copy_(fitted[-1, part])
            block.time_emb_proj, block.skip_time_act = projection, False


def empty_lookup(schema: TimeFeaturesSchema) -> TimeFeatureCache | TimeFeatureTable:
    """Return the look-up that a checkpoint describes, which must have one, without its features."""
    if schema.kind == "cache":
        return TimeFeatureCache(list(schema.timesteps), schema.num_features)
    return TimeFeatureTable(schema.num_timesteps, schema.num_features)
