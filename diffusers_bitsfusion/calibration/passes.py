"""Which layers are looked at together, so that their moments fit the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

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
        groups: layer names of each run, in the order to round them in.
        most_columns: columns of a block of second moments at most.
    """

    groups: list[list[str]]
    most_columns: int


def plan_passes(layers: Mapping[str, nn.Linear | nn.Conv2d], memory: float) -> Passes:
    """As few runs of the pipeline as the memory allows.

    While a layer is rounded, the moments of those after it wait: together they stay within the memory. The layers that
    take most to round come last, when fewer wait. Where a single layer does not fit, blocks become smaller.

    Args:
        layers: what to calibrate, by name.
        memory: bytes that moments and rounding may take.

    Raises:
        ValueError: the memory does not suffice for the largest layer even without correlations between channels.
    """
    most_columns = MOST_COLUMNS
    needs = _needs(layers, most_columns)
    while (most := max(_most([need]) for need in needs.values())) > memory:
        if most_columns == 1:
            raise ValueError(
                f"memory_gb={memory / 1e9:g} is too little for calibration: the largest layer needs {most / 1e9:.2g}."
            )
        most_columns //= 2
        needs = _needs(layers, most_columns)
    groups: list[list[str]] = [[]]
    for name in layers:
        together = sorted([*groups[-1], name], key=lambda name: needs[name].rounding)
        if _most([needs[name] for name in together]) > memory:
            groups.append([name])
        else:
            groups[-1] = together
    return Passes(groups, most_columns)


@dataclass(frozen=True)
class _Needs:
    """Bytes of a layer: its moments, and what rounding takes beside them."""

    moments: int
    rounding: int


def _needs(layers: Mapping[str, nn.Linear | nn.Conv2d], most_columns: int) -> dict[str, _Needs]:
    return {
        name: _Needs(moment_bytes(layer, most_columns), rounding_bytes(layer, most_columns))
        for name, layer in layers.items()
    }


def _most(needs: Sequence[_Needs]) -> int:
    """Bytes at the worst moment, of layers that are rounded in this order."""
    waiting = list(accumulate(need.moments for need in reversed(needs)))[::-1]  # a layer's own among them
    return max(moments + need.rounding for moments, need in zip(waiting, needs, strict=True))
