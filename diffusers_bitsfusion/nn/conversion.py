"""Float layers to packed ones and back, in place in a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..codec.quantize_dense import quantize_to_dense
from ..codec.rounding import Rounding
from .conv import BitsFusionConv2d
from .linear import BitsFusionLinear
from .packed import PackedWeight, without_weight

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the submodule `name` was, in the same training mode."""
    parent, _, attribute = name.rpartition(".")
    new.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), attribute, new)


def why_not_packable(layer: nn.Linear | nn.Conv2d) -> str | None:
    """Why a Linear or Conv2d cannot be replaced by the packed layer, or None where it can: it is more than that."""
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    own = [name for name in ("forward", "_conv_forward") if name in layer.__dict__ or _differs(layer, kind, name)]
    if own:
        return f"{type(layer).__name__} computes otherwise than nn.{kind.__name__}"
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "its weight is computed from other parameters"
    if any(getattr(layer, hooks) for hooks in _HOOKS):
        return "it has hooks, which replacing it would lose"
    return None


def _differs(layer: nn.Module, kind: type[nn.Module], name: str) -> bool:
    return getattr(type(layer), name, None) is not getattr(kind, name, None)


def packed_from_float(
    layer: nn.Linear | nn.Conv2d,
    bits: int,
    dtype: torch.dtype,
    branch_rank: int = 0,
    scale_dtype: str = "float32",
) -> PackedWeight:
    """Return the packed layer of an `nn.Linear` or `nn.Conv2d`, codes and branch still on the meta device."""
    kind = BitsFusionConv2d if isinstance(layer, nn.Conv2d) else BitsFusionLinear
    return kind.from_float(layer, bits, dtype, branch_rank, scale_dtype)


def pack_weight(packed: PackedWeight, weight: Tensor, rounding: Rounding) -> PackedWeight:
    """Quantize `weight` (any floating dtype and device) into `packed`.

    Raises:
        ValueError: the weight holds NaN or infinite values.
    """
    rows = weight.detach().reshape(packed.weight_shape[0], packed.columns)
    dense, scale = quantize_to_dense(rows, packed.bits, rounding)
    packed.set_codes(dense, scale)
    return packed


def float_from_packed(packed: PackedWeight) -> nn.Linear | nn.Conv2d:
    """Return an ordinary layer with the weight in `packed.weight_dtype`, branch folded in, sharing the bias."""
    kind: type[nn.Linear | nn.Conv2d] = nn.Conv2d if isinstance(packed, BitsFusionConv2d) else nn.Linear
    layer = without_weight(kind, packed)
    layer.weight = nn.Parameter(packed.dense_weight(packed.weight_dtype))
    return layer
