"""One layer, calibrated: codes and scales for its inputs, and the bias that makes up for the mean error."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..codec.radix import pack_dense
from ..codec.rounding import Rounding
from ..codec.scales import quantize_rows
from .compensated_rounding import Factor, factorize
from .input_weighted_scales import quantize_rows_for_inputs
from .moments import InputMoments, column_blocks

# Bounds the memory of rounding: some ten numbers a weight.
_WEIGHTS_AT_ONCE = 1 << 23
_BYTES_PER_WEIGHT = 48


@dataclass(frozen=True)
class CalibratedLayer:
    """What packing takes of a calibrated layer.

    Attributes:
        codes: uint8 [out, dense_width(columns, bits)], the dense form of `codec.radix`.
        scale: fp32 [out].
        bias: fp32 [out], or None for a layer without a bias.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def to(self, device: torch.device | str | int) -> CalibratedLayer:
        """The same on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return CalibratedLayer(self.codes.to(device), self.scale.to(device), bias)


@torch.no_grad()
def quantize_layer(
    layer: nn.Linear | nn.Conv2d, moments: InputMoments, bits: int, rounding: Rounding = Rounding()
) -> CalibratedLayer:
    """Round a layer's weight for the inputs that `moments` has seen.

    The error of the output has a mean, which a bias can take, so that with a bias only the inputs' covariance counts.
    Where `moments` has seen nothing, each weight goes to its nearest level.

    Raises:
        ValueError: the weight holds NaN or infinite values.
    """
    weight = layer.weight.detach().flatten(1).float()
    groups = getattr(layer, "groups", 1)
    blocks_per_group = len(moments.blocks) // groups
    codes, scales = [], []
    for group, rows in enumerate(weight.chunk(groups)):
        blocks = range(group * blocks_per_group, (group + 1) * blocks_per_group)
        round_rows = quantize_rows  # of a layer that was never called
        if moments.count:
            factors = _factors(moments, blocks, centred=layer.bias is not None)
            round_rows = partial(quantize_rows_for_inputs, factors=factors)
        for part in rows.split(max(1, _WEIGHTS_AT_ONCE // rows.shape[1])):
            found = round_rows(part, bits=bits, rounding=rounding)
            codes.append(found[0])
            scales.append(found[1])
    code, scale = torch.cat(codes), torch.cat(scales)
    bias = None
    if layer.bias is not None:
        error = weight - scale.unsqueeze(1) * code
        means = moments.mean().view(groups, -1)
        shift = torch.cat([part @ mean for part, mean in zip(error.chunk(groups), means, strict=True)])
        bias = layer.bias.detach().float() + shift
    return CalibratedLayer(pack_dense(code, bits), scale, bias)


def _factors(moments: InputMoments, blocks: range, centred: bool) -> list[Factor]:
    first = moments.blocks[blocks[0]][0]
    return [
        factorize(moments.second_moment(block, centred), start=moments.blocks[block][0] - first) for block in blocks
    ]


def rounding_bytes(layer: nn.Linear | nn.Conv2d, most_columns: int) -> int:
    """Bytes that `quantize_layer` takes at most beside the weight and its moments."""
    sizes = [stop - start for start, stop in column_blocks(layer, most_columns)]
    weights = layer.weight.numel()
    at_once = min(weights, max(_WEIGHTS_AT_ONCE, layer.weight[0].numel()))
    factors = sum(size**2 for size in sizes) // getattr(layer, "groups", 1)  # of one group
    # At most three copies of a block while it is factorized.
    return 4 * factors + 3 * 4 * max(sizes) ** 2 + _BYTES_PER_WEIGHT * at_once + 10 * weights
