"""The time path of a UNet or ControlNet: where it is, what it computes, and taking it out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, ModelMixin, UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..codec.time_schema import TimeFeaturesSchema
from .low_rank_time_features import LowRankTimeFeatures
from .time_features import TimeFeatureCache, TimeFeaturePassThrough, TimeFeatures, TimeFeatureSlice, TimeFeatureTable


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

    @property
    def embedding_width(self) -> int:
        """Width of the time embedding, which every block's projection takes."""
        width: int = self.model.time_embedding.linear_2.out_features
        return width

    @torch.no_grad()
    def compute(self, timesteps: Tensor) -> tuple[Tensor, Iterator[Tensor]]:
        """Compute exactly, in fp32.

        Returns:
            (time embedding before its SiLU, fp32 [timesteps, embedding_width]; the features of one block after
            another, fp32 [timesteps, size]).
        """
        device = self.layers["time_embedding.linear_1"].weight.device
        hidden = self.model.time_proj(timesteps.to(device)).float()
        hidden = self.model.time_embedding.act(self._linear("time_embedding.linear_1", hidden))
        embedding = self._linear("time_embedding.linear_2", hidden).to(device)
        projections = (f"{name}.time_emb_proj" for name in self.blocks)
        return embedding, (self._linear(name, F.silu(embedding)).to(device) for name in projections)

    @torch.no_grad()
    def _linear(self, name: str, x: Tensor) -> Tensor:
        layer = self.layers[name]
        x = x.to(layer.weight.device)  # A model may be spread over several devices.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())


def install(model: ModelMixin, lookup: TimeFeatures, sizes: Iterable[tuple[str, int]], dtype: torch.dtype) -> None:
    """Replace the time path of a model by a look-up.

    Args:
        model: model with its time path.
        lookup: look-up, whose features belong to the blocks of `sizes` in order.
        sizes: (block name, number of features), as `TimePath.sizes`.
        dtype: dtype of the model.
    """
    model.time_proj = lookup
    model.time_embedding = TimeFeaturePassThrough()
    start = 0
    for name, size in sizes:
        block = model.get_submodule(name)
        block.time_emb_proj = TimeFeatureSlice(lookup, start, start + size, dtype)
        block.skip_time_act = True  # The features are those after the activation.
        start += size


def empty_lookup(schema: TimeFeaturesSchema) -> TimeFeatureCache | TimeFeatureTable | LowRankTimeFeatures:
    """Return the look-up that a checkpoint describes, which must have one, without its features."""
    if schema.kind == "cache":
        return TimeFeatureCache(list(schema.timesteps), schema.num_features)
    sizes = schema.num_timesteps, schema.num_features, schema.embedding_width
    return LowRankTimeFeatures(*sizes, schema.rank) if schema.rank else TimeFeatureTable(*sizes)
