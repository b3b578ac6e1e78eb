"""Linear layer on packed weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.linear import int8_linear_weight, linear, linear_geglu
from ..ops.transforms import in_transform, weight
from .packed import PackedWeight, autocast


class BitsFusionLinear(PackedWeight, nn.Linear):
    """`torch.nn.Linear` whose weight is kept as packed codes and per-output-channel scales.

    Built by `quantize_model`, `from_pretrained` or `from_float`. Attributes:
    see `PackedWeight`, and `bias` as in `nn.Linear`. Differentiable in its input and bias, not in codes or scales.
    """

    def forward(self, input: Tensor, geglu: bool = False) -> Tensor:
        """y = input W^T + b, or `ops.linear.linear_geglu` of it."""
        x = autocast(input)
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        packed = self.codes, self.scale_bits
        y: Tensor
        if geglu:
            y = linear_geglu(x, *packed, bias, self.bits, self.weight_shape, self.computes_int8, self.int8_weight)
            return y
        if in_transform():
            y = F.linear(x, weight(*packed, self.bits, self.weight_shape, x.dtype), bias)
        else:
            y = linear(x, *packed, bias, self.bits, self.weight_shape, self.computes_int8, self.int8_weight)
        return y + self._branch(x) if self.branch_rank else y

    def _make_int8_weight(self) -> Tensor:
        return int8_linear_weight(self.codes, self.scale_bits, self.bits, self.weight_shape)

    def _branch(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.branch_down.to(x.dtype)), self.branch_up.to(x.dtype))
