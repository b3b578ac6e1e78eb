"""Which layers are looked at together, so that their moments fit the memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .layers import rounding_bytes
from .moments import moment_bytes

# Wider second moments are cut into blocks of this many columns at most: 640 channels of a 3×3 convolution. Whole,
# those of Stable Diffusion 1.5's widest layers would take sixteen times the arithmetic and several more runs.
MOST_COLUMNS = 5760


@dataclass(frozen=True)
class Passes:
    """How layers are spread over runs of the pipeline.

    Attributes:
        groups: layer names of each run.
        most_columns: columns of a block of second moments at most.
    """

    groups: list[list[str]]
    most_columns: int


def plan_passes(layers: Mapping[str, nn.Linear | nn.Conv2d], memory: float) -> Passes:
    """As few runs of the pipeline as the memory allows.

    While layers of a pass are rounded, the moments of the others wait, and one layer is worked on: together they stay
    within the memory. Where a single layer does not, blocks of moments are made smaller.

    Args:
        layers: what to calibrate, by name.
        memory: bytes that moments and rounding may take.

    Raises:
        ValueError: the memory does not suffice for the largest layer even without correlations between channels.
    """
    most_columns = MOST_COLUMNS
    while (need := _largest_need(layers, most_columns)) > memory:
        if most_columns == 1:
            raise ValueError(
                f"memory_gb={memory / 1e9:g} is too little for calibration: the largest layer needs {need / 1e9:.2g}."
            )
        most_columns //= 2
    room = memory - max(rounding_bytes(layer, most_columns) for layer in layers.values())
    groups: list[list[str]] = []
    taken = room
    for name, layer in layers.items():
        size = moment_bytes(layer, most_columns)
        if taken + size > room:
            groups.append([])
            taken = 0
        groups[-1].append(name)
        taken += size
    return Passes(groups, most_columns)


def _largest_need(layers: Mapping[str, nn.Linear | nn.Conv2d], most_columns: int) -> int:
    moments = max(moment_bytes(layer, most_columns) for layer in layers.values())
    return moments + max(rounding_bytes(layer, most_columns) for layer in layers.values())
