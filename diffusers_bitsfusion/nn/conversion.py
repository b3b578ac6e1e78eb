"""Float layers to packed ones and back, in place in a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..codec.quantize_dense import quantize_to_dense
from ..codec.rounding import Rounding
from .conv import BitsFusionConv2d
from .linear import BitsFusionLinear
from .packed import PackedWeight


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the submodule `name` was, in the same training mode."""
    parent, _, attribute = name.rpartition(".")
    new.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), attribute, new)


def packed_twin(layer: nn.Linear | nn.Conv2d, bits: int, dtype: torch.dtype, branch_rank: int = 0) -> PackedWeight:
    """Packed layer for an `nn.Linear` or `nn.Conv2d`, codes and branch still on the meta device."""
    kind = BitsFusionConv2d if isinstance(layer, nn.Conv2d) else BitsFusionLinear
    return kind.from_float(layer, bits, dtype, branch_rank)


def pack_weight(packed: PackedWeight, weight: Tensor, rounding: Rounding) -> PackedWeight:
    """Quantize `weight` (any floating dtype and device) into `packed`.

    Raises:
        ValueError: the weight holds NaN or infinite values.
    """
    assert packed.bits is not None
    rows = weight.detach().reshape(packed.weight_shape[0], packed.columns)
    dense, scale = quantize_to_dense(rows, packed.bits, rounding)
    packed.set_codes(dense, scale)
    return packed


def float_twin(packed: PackedWeight) -> nn.Linear | nn.Conv2d:
    """Ordinary layer with the weight in `packed.weight_dtype`, branch folded in, sharing the bias."""
    kind: type[nn.Linear | nn.Conv2d] = nn.Conv2d if isinstance(packed, BitsFusionConv2d) else nn.Linear
    layer: nn.Linear | nn.Conv2d = kind.__new__(kind)
    nn.Module.__init__(layer)
    own = PackedWeight.__annotations__
    layer.__dict__.update({k: v for k, v in packed.__dict__.items() if k not in layer.__dict__ and k not in own})
    layer.weight = nn.Parameter(packed.dense_weight(packed.weight_dtype))
    layer.register_parameter("bias", packed.bias)
    return layer
