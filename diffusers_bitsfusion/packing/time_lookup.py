"""The look-up of time features made from a model's time path, in the coding of fewest bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..codec.low_rank_table import LowRankTable, factorize
from ..codec.time_schema import TimeFeaturesSchema
from ..codec.time_table import encode_table, quantize_table
from ..nn.low_rank_time_features import LowRankTimeFeatures
from ..nn.time_features import TimeFeatureCache, TimeFeatures, TimeFeatureTable
from ..nn.time_path import TimePath, empty_lookup


@torch.no_grad()
def make_lookup(path: TimePath, schema: TimeFeaturesSchema) -> tuple[TimeFeatures, TimeFeaturesSchema]:
    """Return the look-up of a time path's features, and its schema, which may be of low rank.

    Args:
        path: time path with its weights.
        schema: what the look-up is to be, "table" or "cache".
    """
    lookup = empty_lookup(schema)
    if isinstance(lookup, TimeFeatureCache):
        _, blocks = path.compute(torch.tensor(schema.timesteps, dtype=torch.float32))
        lookup.set_features(torch.cat(list(blocks), dim=1))
        return lookup, schema
    assert isinstance(lookup, TimeFeatureTable)
    embedding, blocks = path.compute(lookup.rows)
    parts = [*blocks, embedding]
    if (table := smaller_table(parts)) is not None:
        schema = replace(schema, rank=table.rank)
        sums = empty_lookup(schema)
        assert isinstance(sums, LowRankTimeFeatures)
        sums.set_table(table)
        return sums, schema
    lookup.set_embedding(*quantize_table(embedding))
    start = 0
    for features in parts[:-1]:
        lookup.set_codes(*quantize_table(features), start=start)
        start += features.shape[1]
    return lookup, schema


def smaller_table(parts: Sequence[Tensor]) -> LowRankTable | None:
    """Return a table of low rank that takes fewer bytes than codes of each feature, or None where there is none.

    Args:
        parts: features of each block, and the time embedding, fp32 [timesteps, columns] each.
    """
    table = factorize(parts)
    if table is not None:
        codes = torch.cat([quantize_table(part)[0] for part in parts], dim=1)
        if table.file_bytes() < encode_table(codes.cpu()).numel():
            return table
    return None
