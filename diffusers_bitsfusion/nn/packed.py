"""What the packed layers share: codes and scales as parameters, and the weight computed from them."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..codec.radix import dense_width
from ..ops.decode import decode_to_scratch, decode_weight

LayerT = TypeVar("LayerT", bound="PackedWeight")


def float_bits(values: Tensor) -> nn.Parameter:
    """fp32 values as a parameter of their bits (int32), which no loader or `.to(dtype)` casts."""
    return nn.Parameter(values.to(torch.float32).contiguous().view(torch.int32), requires_grad=False)


class PackedWeight(nn.Module):
    """Mixin before `nn.Linear` or `nn.Conv2d`: an ordinary float layer until it is given codes.

    With codes, `weight` is no longer stored but computed on every read. Integer parameters rather than buffers or
    floats: offloading moves them, and no cast touches them.

    Attributes (when packed):
        codes (`nn.Parameter`): uint8 [out, dense_width(in * kernel, bits)], the dense form of `codec.radix`.
        scale (`nn.Parameter`): int32 [out], the bits of the fp32 scales.
        bits (`int`): 1 to 8.
        weight_shape (`tuple[int, ...]`): shape of the weight.
        weight_dtype (`torch.dtype`): dtype that reading `weight` gives; `forward` follows its input instead.
    """

    bits: int | None = None
    weight_shape: tuple[int, ...]
    weight_dtype: torch.dtype

    @classmethod
    def from_float(cls: type[LayerT], layer: nn.Linear | nn.Conv2d, bits: int, dtype: torch.dtype) -> LayerT:
        """Packed twin of a Linear or Conv2d, with codes on the meta device and the layer's own bias."""
        packed = cls.__new__(cls)
        nn.Module.__init__(packed)
        # Every setting of the float layer (stride, padding, ...) and its bias, without its weight.
        packed.__dict__.update({key: value for key, value in layer.__dict__.items() if key not in packed.__dict__})
        packed.bits = bits
        packed.weight_shape = tuple(layer.weight.shape)
        packed.weight_dtype = dtype
        rows, columns = packed.weight_shape[0], packed.columns
        with torch.device("meta"):
            packed.codes = nn.Parameter(
                torch.empty(rows, dense_width(columns, bits), dtype=torch.uint8), requires_grad=False
            )
            packed.scale = float_bits(torch.empty(rows))
        packed.register_parameter("bias", cast("nn.Parameter | None", layer.bias))
        return packed

    @property
    def columns(self) -> int:
        """Weights an output channel has."""
        return torch.Size(self.weight_shape[1:]).numel()

    @property
    def is_packed(self) -> bool:
        return self.bits is not None

    def set_codes(self, codes: Tensor, scale: Tensor) -> None:
        """Take codes uint8 [out, dense_width(columns, bits)] and scale fp32 [out]."""
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = float_bits(scale)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, a new tensor."""
        assert self.bits is not None
        return decode_weight(self.codes, self.scale.view(torch.float32), self.bits, self.weight_shape, dtype)

    def decode_for_call(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, valid until the next layer of this thread decodes."""
        assert self.bits is not None
        return decode_to_scratch(self.codes, self.scale.view(torch.float32), self.bits, self.weight_shape, dtype)

    def __getattr__(self, name: str) -> Any:
        # Not a property of the class: nn.Linear's constructor assigns `weight`, and a layer without codes keeps it.
        if name == "weight" and "codes" in self._parameters:
            return self.decode(self.weight_dtype)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see the call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast(x: Tensor) -> Tensor:
    """Input in autocast's dtype, where it is on: the packed layers call no operation that autocast would."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:  # which autocast leaves alone
        return x
    return x.to(torch.get_autocast_dtype(device))
