"""A packed model in operations that tracers of other frameworks know, with each code in a byte of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codec.low_rank_table import LowRankTable
from .compute import packed_layers, undo_fusions
from .conv import BitsFusionConv2d
from .conversion import replace_module
from .low_rank_time_features import LowRankTimeFeatures, look_up_sums
from .packed import PackedWeight
from .time_features import TimeFeatureCache, TimeFeatureTable, look_up


class TraceableLayer(nn.Module):
    """A packed layer as a product of codes and scales: a constant of integers, a cast and a multiplication.

    Attributes:
        codes (`nn.Buffer`): int8, of the weight's shape.
        scale (`nn.Buffer`): fp32 [out, 1, ...], with as many dimensions.
        bits (`int`): of the packed layer.
    """

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self.codes = nn.Buffer(packed.decode(torch.int8))
        ones = [1] * (len(packed.weight_shape) - 1)
        self.scale = nn.Buffer(packed.scale_bits.view(torch.float32).reshape(-1, *ones).clone())
        self.bits = packed.bits
        self.geometry = packed  # The packed layer also has the bias and the branch.

    def forward(self, input: Tensor) -> Tensor:
        """Return what the packed layer returns, computed exactly."""
        packed = self.geometry
        weight, bias = self.codes.to(input.dtype) * self.scale, packed.bias
        if isinstance(packed, BitsFusionConv2d):
            x, padding = packed._pad(input)
            y = F.conv2d(x, weight, bias, packed.stride, padding, packed.dilation, packed.groups)
            return y + packed._branch(x, padding) if packed.branch_rank else y
        y = F.linear(input, weight, bias)
        return y + packed._branch(input) if packed.branch_rank else y


class TraceableTimeTable(nn.Module):
    """A `TimeFeatureTable` without the check of its timesteps, which a tracer would not keep."""

    def __init__(self, table: TimeFeatureTable) -> None:
        super().__init__()
        self.num_timesteps = table.num_timesteps
        features, embedding = table.tables
        self.codes, self.scale = map(nn.Buffer, features)
        self.has_embedding = embedding is not None
        if embedding is not None:
            self.embedding_codes, self.embedding_scale = map(nn.Buffer, embedding)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return what the table returns for `timesteps` [batch], fp32."""
        embedding = (self.embedding_codes, self.embedding_scale) if self.has_embedding else None
        table = self.codes, self.scale
        return look_up(timesteps.to(torch.float32), self.num_timesteps, table, embedding)


class TraceableLowRankTable(nn.Module):
    """A `LowRankTimeFeatures` without the check of its timesteps, as `TraceableTimeTable`."""

    def __init__(self, lookup: LowRankTimeFeatures) -> None:
        super().__init__()
        self.num_timesteps, self.num_features = lookup.num_timesteps, lookup.num_features
        table = lookup.table
        self.basis, self.basis_scale = nn.Buffer(table.basis), nn.Buffer(table.basis_scale)
        self.coefficients, self.scale = nn.Buffer(table.coefficients), nn.Buffer(table.scale)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return what the look-up returns for `timesteps` [batch], fp32."""
        table = LowRankTable(self.basis, self.basis_scale, self.coefficients, self.scale)
        return look_up_sums(timesteps.to(torch.float32), self.num_timesteps, table, self.num_features)


class TraceableTimeCache(nn.Module):
    """A `TimeFeatureCache` without the check of its timesteps: of one that it does not have, the first's features."""

    def __init__(self, cache: TimeFeatureCache) -> None:
        super().__init__()
        timesteps, features = cache.features()
        self.timesteps, self.values = nn.Buffer(timesteps), nn.Buffer(features)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return the features of `timesteps` [batch], fp32 [batch, features]."""
        match = timesteps.to(torch.float32).unsqueeze(1) == self.timesteps
        return self.values[match.to(torch.int32).argmax(dim=1)]


def make_traceable(model: nn.Module) -> dict[str, int]:
    """Replace the packed layers and the look-up of a model in place, which computes the same afterwards.

    Args:
        model: a packed model on a CPU, with floats in fp32; it can no longer be saved or dequantized.

    Returns:
        Bits of each layer by its name.
    """
    undo_fusions(model)
    layers = packed_layers(model)
    for name, layer in layers.items():
        replace_module(model, name, TraceableLayer(layer))
    lookup = getattr(model, "time_proj", None)
    if isinstance(lookup, TimeFeatureTable):
        model.time_proj = TraceableTimeTable(lookup)
    elif isinstance(lookup, LowRankTimeFeatures):
        model.time_proj = TraceableLowRankTable(lookup)
    elif isinstance(lookup, TimeFeatureCache):
        model.time_proj = TraceableTimeCache(lookup)
    return {name: layer.bits for name, layer in layers.items()}
