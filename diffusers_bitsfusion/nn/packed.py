"""What the packed layers share: codes and scales, a low-rank branch, and the weight computed from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..codec.radix import dense_width
from ..codec.schema import branch_shapes
from ..ops.decode import decode_weight
from ..ops.dispatch import KernelSelection, select_for_layer

LayerT = TypeVar("LayerT", bound="PackedWeight")


def float_bits(values: Tensor) -> nn.Parameter:
    """fp32 values as a parameter of their bits (int32), which no loader or `.to(dtype)` casts."""
    return nn.Parameter(values.to(torch.float32).contiguous().view(torch.int32), requires_grad=False)


class PackedWeight(nn.Module):
    """Mixin before `nn.Linear` or `nn.Conv2d`: an ordinary float layer until it is given codes.

    With codes, `weight` is no longer stored but computed on every read. Integer parameters rather than buffers or
    floats: offloading moves them, and no cast touches them. A layer may also hold a low-rank branch, whose product
    up @ down is added to the decoded weight: fused LoRAs, which rounding to the grid would lose.

    In forward-mode differentiation the layer computes exactly, whatever `compute` says.

    Attributes (when packed):
        codes (`nn.Parameter`): uint8 [out, dense_width(in * kernel, bits)], the dense form of `codec.radix`.
        scale (`nn.Parameter`): int32 [out], the bits of the fp32 scales.
        branch_down (`nn.Parameter | None`): `weight_dtype` [rank, in] or [rank, in, height, width].
        branch_up (`nn.Parameter | None`): `weight_dtype` [out, rank] or [out, rank, 1, 1].
        bits (`int`): 1 to 8.
        weight_shape (`tuple[int, ...]`): shape of the weight.
        weight_dtype (`torch.dtype`): dtype that reading `weight` gives; `forward` follows its input instead.
        compute, resident (`str`): as in `BitsFusionConfig`; changed by `set_compute`.
        sensitive (`bool`): whether it stays exact beside layers that compute in integers; see `ops.dispatch`.
        computes_int8 (`bool`): whether `forward` multiplies in integers.
        int8_weight (`torch.Tensor | None`): the codes in the form that integer arithmetic takes, where they are kept.
            It follows the codes, and is neither a parameter nor saved.
    """

    bits: int | None = None
    weight_shape: tuple[int, ...]
    weight_dtype: torch.dtype
    compute: str = "auto"
    resident: str = "packed"
    sensitive: bool = False
    computes_int8: bool = False
    int8_weight: Tensor | None = None

    _make_int8_weight: Callable[[], Tensor]  # of each kind of layer

    @classmethod
    def from_float(
        cls: type[LayerT], layer: nn.Linear | nn.Conv2d, bits: int, dtype: torch.dtype, branch_rank: int = 0
    ) -> LayerT:
        """Packed twin of a Linear or Conv2d, with codes and branch on the meta device and the layer's own bias."""
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
        down, up = branch_shapes(packed.weight_shape, branch_rank)
        with torch.device("meta"):
            packed._set_branch(torch.empty(down, dtype=dtype), torch.empty(up, dtype=dtype))
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

    @property
    def branch_rank(self) -> int:
        return 0 if self.branch_down is None else self.branch_down.shape[0]

    def extend_branch(self, down: Tensor, up: Tensor) -> None:
        """Add up @ down to the weight: down [rank, ...] and up [out, rank, ...], floating, as in `branch_shapes`."""
        down, up = (half.detach().to(self.codes.device, self.weight_dtype) for half in (down, up))
        if self.branch_rank:
            down, up = torch.cat([self.branch_down, down]), torch.cat([self.branch_up, up], dim=1)
        self._set_branch(down, up)

    def shrink_branch(self, rank: int) -> None:
        """Undo what `extend_branch` added after the branch had `rank`."""
        self._set_branch(self.branch_down[:rank], self.branch_up[:, :rank])

    def _set_branch(self, down: Tensor, up: Tensor) -> None:
        for name, half in (("branch_down", down), ("branch_up", up)):
            parameter = nn.Parameter(half.detach().clone(), requires_grad=False) if len(down) else None
            self.register_parameter(name, parameter)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight of the codes in `dtype`, a new tensor."""
        assert self.bits is not None
        return decode_weight(self.codes, self.scale.view(torch.float32), self.bits, self.weight_shape, dtype)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight that the layer applies, branch included, rounded once to `dtype`; a new tensor."""
        if not self.branch_rank:
            return self.decode(dtype)
        delta = self.branch_up.float().flatten(1) @ self.branch_down.float().flatten(1)
        return (self.decode(torch.float32) + delta.view(self.weight_shape)).to(dtype)

    def way(self, compute: str | None = None, resident: str | None = None) -> KernelSelection:
        """How `forward` computes, or would with other settings; raises as `ops.dispatch.select_for_layer`."""
        assert self.bits is not None
        settings = compute or self.compute, resident or self.resident
        return select_for_layer(*settings, self.bits, self.codes.device, self.sensitive, isinstance(self, nn.Linear))

    def set_compute(self, compute: str, resident: str) -> None:
        """Change how `forward` computes; see `diffusers_bitsfusion.set_compute`, raises as `ops.dispatch`."""
        self.computes_int8 = self.way(compute, resident).arithmetic == "int8"
        self.compute, self.resident = compute, resident
        self._renew_int8_weight()

    def _renew_int8_weight(self) -> None:
        keep = self.computes_int8 and self.resident == "int8" and not self.codes.is_meta
        self.int8_weight = self._make_int8_weight() if keep else None

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Any:
        before = self.codes.device if self.is_packed else None
        super()._apply(fn, recurse)
        if self.is_packed and self.codes.device != before and not self.codes.is_meta:
            self.set_compute(self.compute, self.resident)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.int8_weight is not None:
            self._renew_int8_weight()

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's layouts can neither be deep-copied nor pickled: they are made anew.
        return {name: value for name, value in self.__dict__.items() if name != "int8_weight"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.computes_int8:  # which this machine may do otherwise
            self.set_compute(self.compute, self.resident)

    def __getattr__(self, name: str) -> Any:
        # Not a property of the class: nn.Linear's constructor assigns `weight`, and a layer without codes keeps it.
        if name == "weight" and "codes" in self._parameters:
            return self.dense_weight(self.weight_dtype)
        if name == "qweight" and "codes" in self._parameters:
            return self.codes  # PEFT looks there first for the layer's device, many times for each adapter
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


def autocast(x: Tensor) -> Tensor:
    """Input in autocast's dtype, where it is on: the packed layers call no operation that autocast would.

    Raises:
        TypeError: the input is not floating; the layer has no weights of such a dtype.
    """
    if not x.is_floating_point():
        raise TypeError(f"A packed layer takes floating-point inputs, got {x.dtype}.")
    device = x.device.type
    # Autocast knows nothing of meta tensors, and leaves fp64 alone.
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
