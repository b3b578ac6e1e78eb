"""Parameters of modules of any kind as codes and scales, beside the module's own forward."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..codec.quantize_dense import quantize_to_dense
from ..codec.radix import dense_width
from ..codec.rounding import Rounding
from ..codec.scales import round_scale
from ..codec.schema import TENSOR_PREFIX, LayerSchema
from ..ops.transforms import weight
from ..utils.mixins import PutBefore, with_mixin
from .lazy_weight import LazyWeight, refuse_assigning
from .packed import HoldsCodes, float_bits


class PackedTensor(HoldsCodes):
    """A parameter of a module, kept as codes and scales; made by `pack_tensor` or `empty_tensor`.

    Calling it gives the parameter as a tensor that is decoded where it is used, see `LazyWeight`.

    Attributes:
        codes (`nn.Parameter`): uint8 [rows, dense_width(columns, bits)], the dense form of `codec.radix`.
        scale (`nn.Parameter`): int32 [rows, 1], the bits of the fp32 scales.
        schema (`LayerSchema`): bits, and how rows and columns become the parameter.
        weight_dtype (`torch.dtype`): dtype of the parameter.
    """

    codes: nn.Parameter
    scale: nn.Parameter

    def __init__(self, schema: LayerSchema, dtype: torch.dtype) -> None:
        super().__init__()
        self.schema = schema
        self.weight_dtype = dtype
        with torch.device("meta"):
            codes = torch.empty(schema.rows, dense_width(schema.columns, schema.bits), dtype=torch.uint8)
            self.set_codes(codes, torch.empty(schema.rows))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.schema.shape[axis] for axis in self._axes)

    @property
    def _axes(self) -> tuple[int, ...]:
        return self.schema.order or tuple(range(len(self.schema.shape)))

    def set_codes(self, codes: Tensor, scale: Tensor) -> None:
        """Take codes uint8 [rows, dense_width(columns, bits)] and scale fp32 [rows]."""
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = float_bits(round_scale(scale, self.schema.scale_dtype))

    def forward(self) -> Tensor:
        """Return the parameter, decoded where it is used."""
        # Offloading may move or empty the parameters as soon as this returns, before the values are used.
        kept = self.codes.detach(), self.scale.detach()
        decode = functools.partial(_decode, *kept, self.schema, self._axes, self.weight_dtype)
        if torch.compiler.is_compiling():
            return decode()
        like = torch.empty(self.shape, dtype=self.weight_dtype, device="meta")
        is_table = len(self.shape) == 2 and not self.schema.order
        rows = functools.partial(_decode_rows, *kept, self.schema, self.weight_dtype) if is_table else None
        return LazyWeight(decode, like, self.codes.device, rows, owner=self)

    def decode(self) -> Tensor:
        """Return the parameter, a new tensor."""
        return _decode(self.codes, self.scale, self.schema, self._axes, self.weight_dtype)

    def extra_repr(self) -> str:
        """Return what a printed model shows of it."""
        return f"{tuple(self.shape)}, bits={self.schema.bits}"


def _decode(codes: Tensor, scale: Tensor, schema: LayerSchema, axes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    rows: Tensor = weight(codes, scale.view(-1), schema.bits, (schema.rows, schema.columns), dtype)
    return rows.view(schema.shape).permute(axes).contiguous()


def _decode_rows(codes: Tensor, scale: Tensor, schema: LayerSchema, dtype: torch.dtype, indices: Tensor) -> Tensor:
    """Return the rows of a table at `indices`, any shape, decoded alone: [*indices.shape, columns]."""
    places = indices.flatten()
    chosen = codes.index_select(0, places), scale.view(-1).index_select(0, places)
    rows: Tensor = weight(*chosen, schema.bits, (len(places), schema.columns), dtype)
    return rows.view(*indices.shape, schema.columns)


class HoldsPackedTensors(PutBefore):
    """Mixin of a module some of whose parameters are packed: its own forward reads them as if they were there."""

    def __getattr__(self, name: str) -> Any:
        packed = self.__dict__.get("_modules", {}).get(TENSOR_PREFIX + name)
        return super().__getattr__(name) if packed is None else packed()

    def __setattr__(self, name: str, value: Any) -> None:
        packed = self.__dict__.get("_modules", {}).get(TENSOR_PREFIX + name)
        if packed is not None:
            refuse_assigning(packed, value)
            return
        super().__setattr__(name, value)


def pack_tensor(schema: LayerSchema, value: Tensor, dtype: torch.dtype, rounding: Rounding) -> PackedTensor:
    """Quantize a parameter.

    Args:
        schema: bits, and how the parameter becomes rows.
        value: of the parameter, any floating dtype and device.
        dtype: that reading it gives.
        rounding: settings of rounding.

    Raises:
        ValueError: the parameter holds NaN or infinite values.
    """
    packed = PackedTensor(schema, dtype)
    back = [schema.order.index(axis) for axis in range(value.dim())] if schema.order else range(value.dim())
    rows = value.detach().permute(*back).reshape(schema.rows, schema.columns)
    packed.set_codes(*quantize_to_dense(rows, schema.bits, rounding))
    return packed


def hold(owner: nn.Module, parameter: str, packed: PackedTensor) -> None:
    """Put a packed tensor in the place of a parameter; the module keeps its class, hooks and everything else."""
    if not isinstance(owner, HoldsPackedTensors):
        plain: Any = type(owner)
        owner.__class__ = with_mixin(HoldsPackedTensors, plain)
    del owner._parameters[parameter]
    owner.add_module(TENSOR_PREFIX + parameter, packed)


def restore_tensors(model: nn.Module) -> None:
    """Put decoded parameters in the place of all packed tensors of a model."""
    for owner in list(model.modules()):
        if not isinstance(owner, HoldsPackedTensors):
            continue
        packed = [name for name, part in owner.named_children() if isinstance(part, PackedTensor)]
        values = {name: getattr(owner, name).decode() for name in packed}
        owner.__class__ = type(owner).__bases__[1]
        for name, value in values.items():
            delattr(owner, name)
            owner.register_parameter(name.removeprefix(TENSOR_PREFIX), nn.Parameter(value))


def packed_tensors(model: nn.Module) -> dict[str, PackedTensor]:
    """Return the packed tensors of a model by name, that of the layer and `packed_` with that of the parameter."""
    return {name: part for name, part in model.named_modules() if isinstance(part, PackedTensor)}


def num_packed_weights(packed: PackedTensor) -> int:
    """Return the number of elements of the parameter."""
    return math.prod(packed.schema.shape)
