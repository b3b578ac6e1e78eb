"""Calibration of one layer: codes and scales for its inputs, and the bias that compensates the mean error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..codec.radix import pack_dense
from ..codec.rounding import Rounding
from ..codec.scales import quantize_rows
from .compensated_rounding import Factor, factorize
from .input_weighted_scales import quantize_rows_for_inputs
from .moments import InputMoments, column_blocks
from .rate_target import quantize_rows_at_rate

# Number of weights that are rounded at once, which bounds the memory of rounding.
_WEIGHTS_AT_ONCE = 1 << 23
# Bytes of rounding for each weight that is rounded at once: about ten fp32 numbers and as many bytes of codes.
_BYTES_PER_WEIGHT = 48


@dataclass(frozen=True)
class CalibratedLayer:
    """Codes, scale and bias of a calibrated layer, as packing needs them.

    Attributes:
        codes: uint8 [out, dense_width(columns, bits)], the dense form of `codec.radix`.
        scale: fp32 [out].
        bias: fp32 [out], or None for a layer without a bias.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def to(self, device: torch.device | str | int) -> CalibratedLayer:
        """Return the layer on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return CalibratedLayer(self.codes.to(device), self.scale.to(device), bias)


@torch.no_grad()
def quantize_layer(
    layer: nn.Linear | nn.Conv2d,
    moments: InputMoments,
    bits: int,
    rounding: Rounding = Rounding(),
    rate: float | None = None,
) -> CalibratedLayer:
    """Round a layer's weight for the inputs that `moments` has counted.

    A bias compensates the mean of the output's error, so that with a bias only the inputs' covariance counts. Where
    `moments` has counted nothing, each weight is rounded to its nearest level.

    Args:
        layer: float layer.
        moments: moments of the layer's inputs.
        bits: number of bits, 1 to 8.
        rounding: how scales are computed, and on which grid.
        rate: bits a weight that the codes may take in the file, see `rate_target.quantize_rows_at_rate`; None for the
            least error and entropy at the grid's own step.

    Raises:
        ValueError: the weight holds NaN or infinite values.
    """
    weight = layer.weight.detach().flatten(1).float()
    groups = getattr(layer, "groups", 1)
    blocks_per_group = len(moments.blocks) // groups
    codes, scales = [], []
    for group, rows in enumerate(weight.chunk(groups)):
        blocks = range(group * blocks_per_group, (group + 1) * blocks_per_group)
        # Nothing is known of the inputs of a layer that was never called.
        factors = _factors(moments, blocks, centred=layer.bias is not None) if moments.count else []
        for part in rows.split(max(1, _WEIGHTS_AT_ONCE // rows.shape[1])):
            if rate is not None:
                part_codes, part_scale = quantize_rows_at_rate(part, factors, bits, rate)
            elif factors:
                part_codes, part_scale = quantize_rows_for_inputs(part, factors, bits, rounding)
            else:
                part_codes, part_scale = quantize_rows(part, bits, rounding)
            codes.append(part_codes)
            scales.append(part_scale)
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


def rounding_bytes(layer: nn.Linear | nn.Conv2d, max_columns: int) -> int:
    """Return an upper bound of the bytes that `quantize_layer` needs beside the weight and its moments.

    Args:
        layer: float layer.
        max_columns: upper bound of the columns of a block of second moments.
    """
    sizes = [stop - start for start, stop in column_blocks(layer, max_columns)]
    weights = layer.weight.numel()
    at_once = min(weights, max(_WEIGHTS_AT_ONCE, layer.weight[0].numel()))
    factors = sum(size**2 for size in sizes) // getattr(layer, "groups", 1)  # Elements of the factors of one group.
    # At most three copies of a block while it is factorized.
    return 4 * factors + 3 * 4 * max(sizes) ** 2 + _BYTES_PER_WEIGHT * at_once + 10 * weights
