"""The paper's average bits a weight (section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..codec.grid import cost_in_bits
from ..codec.schema import TENSOR_PREFIX

# Names of the first and last layers of diffusers' UNets, ControlNets and transformers. No recipe covers them; they are
# quantized to `in_out_bits`.
IN_OUT_LAYERS = (
    "conv_in", "conv_out", "pos_embed.proj", "patch_embed.proj", "x_embedder", "img_in", "proj_in", "proj_out"
)  # fmt: skip

# Timesteps that 50 steps of PNDM visit on a Stable Diffusion model, the sampling of the paper (section 5).
PAPER_TIMESTEPS = tuple(range(1, 1000, 20))


# What torch puts between a layer and the parameters that its weight is computed from.
_COMPUTED = ".parametrizations.weight"


def is_in_out(name: str) -> bool:
    """Return whether a name in a plan is that of a first or last layer, or of a packed parameter of one."""
    return name.partition(f".{TENSOR_PREFIX}")[0].removesuffix(_COMPUTED) in IN_OUT_LAYERS


@dataclass(frozen=True)
class AverageBits:
    """Average bits a weight.

    Attributes:
        paper: log2(levels) of every layer plus 16 bits a cached time feature, over all Linear and Conv2d weights of
            the original model, removed ones included. A table of all timesteps counts as the paper's 50 cached
            steps, to compare recipes; its real cost shows in the file's bytes.
        layers: log2(levels) averaged over the weights of the packed layers, without the first and the last one.
    """

    paper: float
    layers: float


def cached_bits(features: int, timesteps: int) -> float:
    """Return the bits of cached time features in the paper's formula (section 5), 16 each."""
    return 16.0 * features * timesteps


def average_bits(
    layers: Mapping[str, tuple[int, int]],
    *,
    balance: bool = True,
    other_weights: int = 0,
    removed_weights: int = 0,
    cached: float = 0.0,
) -> AverageBits:
    """Return the average bits a weight by the paper's formula (section 5).

    Args:
        layers: (bits, number of weights) of each packed layer, by its name.
        balance: whether the grids are balanced.
        other_weights: number of Linear and Conv2d weights that stay in 16 bits.
        removed_weights: number of weights of the time embedding, where features replace it.
        cached: bits of those features, see `cached_bits`.
    """
    cost = {name: cost_in_bits(bits, balance) * count for name, (bits, count) in layers.items()}
    inner = [name for name in layers if not is_in_out(name)]
    total = sum(count for _, count in layers.values()) + other_weights + removed_weights
    return AverageBits(
        paper=(sum(cost.values()) + cached + 16 * other_weights) / total,
        layers=sum(cost[name] for name in inner) / max(sum(layers[name][1] for name in inner), 1),
    )
