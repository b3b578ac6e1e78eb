"""Spread of the layers over runs of the pipeline, so that their moments fit the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from .layers import rounding_bytes
from .moments import moment_bytes

# Number of columns that a block of second moments has at most: 640 channels of a 3×3 convolution. In one block, the
# second moments of Stable Diffusion 1.5's widest layers would need sixteen times the arithmetic and several more runs.
MAX_COLUMNS = 5760


@dataclass(frozen=True)
class Passes:
    """Spread of layers over runs of the pipeline.

    Attributes:
        groups: layer names of each run, in the order of rounding.
        max_columns: upper bound of the columns of a block of second moments.
    """

    groups: list[list[str]]
    max_columns: int


def plan_passes(layers: Mapping[str, nn.Linear | nn.Conv2d], memory: float) -> Passes:
    """Spread layers over as few runs of the pipeline as the memory allows.

    While a layer is rounded, the moments of the layers after it wait; together they stay within the memory. The layers
    whose rounding needs the most memory come last, when fewer layers wait. Where a single layer does not fit, blocks
    become smaller.

    Args:
        layers: layers to calibrate, by name.
        memory: upper bound of the bytes of moments and rounding.

    Raises:
        ValueError: the memory does not suffice for the largest layer even without correlations between channels.
    """
    max_columns = MAX_COLUMNS
    needs = _needs(layers, max_columns)
    while (largest := max(_peak([need]) for need in needs.values())) > memory:
        if max_columns == 1:
            raise ValueError(
                f"memory_gb={memory / 1e9:g} is too little for calibration: the largest layer needs "
                f"{largest / 1e9:.2g}."
            )
        max_columns //= 2
        needs = _needs(layers, max_columns)
    groups: list[list[str]] = [[]]
    for name in layers:
        together = sorted([*groups[-1], name], key=lambda name: needs[name].rounding)
        if _peak([needs[name] for name in together]) > memory:
            groups.append([name])
        else:
            groups[-1] = together
    return Passes(groups, max_columns)


@dataclass(frozen=True)
class _Needs:
    """Bytes that a layer needs.

    Attributes:
        moments: bytes of its moments.
        rounding: bytes of rounding beside them.
    """

    moments: int
    rounding: int


def _needs(layers: Mapping[str, nn.Linear | nn.Conv2d], max_columns: int) -> dict[str, _Needs]:
    return {
        name: _Needs(moment_bytes(layer, max_columns), rounding_bytes(layer, max_columns))
        for name, layer in layers.items()
    }


def _peak(needs: Sequence[_Needs]) -> int:
    """Return the peak memory, in bytes, of layers that are rounded in this order."""
    waiting = list(accumulate(need.moments for need in reversed(needs)))[::-1]  # A layer's own moments are included.
    return max(moments + need.rounding for moments, need in zip(waiting, needs, strict=True))
