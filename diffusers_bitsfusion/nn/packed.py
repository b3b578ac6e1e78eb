"""What the packed layers share: codes and scales, a low-rank branch, and the weight computed from them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..codec.radix import dense_width
from ..codec.scales import round_scale
from ..codec.schema import branch_shapes
from ..ops.decode import decode_weight
from ..ops.dispatch import KernelSelection, select_for_layer
from ..ops.transforms import weight
from ..utils.reinterpret import reinterpret
from .earlier_states import TakesEarlierStates
from .lazy_weight import LazyWeight, refuse_assigning
from .low_rank_branch import LowRankBranch

LayerT = TypeVar("LayerT", bound="PackedWeight")
AnyLayerT = TypeVar("AnyLayerT", bound=nn.Module)


def float_bits(values: Tensor) -> nn.Parameter:
    """fp32 values [n] as a parameter of their bits, int32 [n, 1].

    No loader and no `.to(dtype)` casts integers; of two dimensions, because many recipes for training cast whatever
    parameters have one (biases, norms) to fp32, without asking for their dtype.
    """
    bits = values.to(torch.float32).contiguous().view(torch.int32)
    return nn.Parameter(bits.view(-1, 1), requires_grad=False)


def from_float_bits(bits: Tensor) -> Tensor:
    """Return the values of `float_bits`, fp32 [n], in its memory."""
    return reinterpret(bits.detach(), torch.float32).view(-1)


# The arguments of the constructors, beside `bias`, that say what a layer computes; attributes of the same names.
_ARGUMENTS = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv2d: (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    ),
}  # fmt: skip


def refuse_gradients(name: str) -> NoReturn:
    """Refuse to train the codes of what is called `name`.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"{name} cannot be trained whole: packed weights are integers, and only tensors of floating point can require "
        "gradients. Train an adapter on it (`add_adapter`), or the full-precision model by `prepare_qat`."
    )


def without_weight(kind: type[AnyLayerT], layer: nn.Module) -> AnyLayerT:
    """Make a layer of the geometry and bias of another, with no weight yet.

    Args:
        kind: `nn.Linear`, `nn.Conv2d` or a class that extends one of them; its own constructor is not called.
        layer: of the same one of the two.
    """
    base: Any = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    made = kind.__new__(kind)
    base.__init__(made, **{name: getattr(layer, name) for name in _ARGUMENTS[base]}, bias=False, device="meta")
    del made.weight
    made.bias = layer.bias
    return made


# Dtypes that layers compute in; a cast to others, such as fp8, only stores.
_COMPUTING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class HoldsCodes(TakesEarlierStates):
    """Mixin of modules whose parameters are codes and scales as integers: no gradients, and no cast but of the weight.

    Attributes:
        weight_dtype (`torch.dtype`): dtype of the decoded weight, which follows casts as a parameter would.
    """

    weight_dtype: torch.dtype

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Any:
        device = next(self.parameters(recurse=False)).device
        cast = fn(torch.empty(0, dtype=self.weight_dtype, device=device)).dtype
        if fn(torch.empty(0, dtype=torch.uint8, device=device)).dtype != torch.uint8:
            raise TypeError(
                f"{type(self).__name__} holds codes, which no cast may change. Cast by `.to(dtype)` where the model "
                "allows it, or load it in another `dtype`."
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if cast in _COMPUTING:
            self.weight_dtype = cast
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As `nn.Module.requires_grad_`.

        Raises:
            RuntimeError: gradients are asked for; nothing has changed then.
        """
        if requires_grad:
            refuse_gradients(type(self).__name__)
        return super().requires_grad_(False)


class PackedWeight(HoldsCodes, LowRankBranch):
    """Mixin before `nn.Linear` or `nn.Conv2d` whose weight is kept as codes and scales, made by `from_float`.

    `weight` is not stored but decoded where it is used, see `LazyWeight`. Codes and scales are integer parameters
    rather than buffers or floats: offloading moves them, and no cast touches them. A layer may also hold a low-rank
    branch, whose product up @ down is added to the decoded weight: fused LoRAs, which rounding to the grid would lose.

    In forward-mode differentiation the layer computes exactly, whatever `compute` says.

    Attributes:
        codes (`nn.Parameter`): uint8 [out, dense_width(in * kernel, bits)], the dense form of `codec.radix`.
        scale (`nn.Parameter`): int32 [out, 1], the bits of the fp32 scales.
        scale_dtype (`str`): "float32"; or "bfloat16" where the file has scales of 16 bits: all that the layer is given
            are rounded to them.
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

    bits: int
    weight_shape: tuple[int, ...]
    weight_dtype: torch.dtype
    scale_dtype: str = "float32"
    compute: str = "auto"
    resident: str = "packed"
    sensitive: bool = False
    computes_int8: bool = False
    int8_weight: Tensor | None = None

    _make_int8_weight: Callable[[], Tensor]  # Each kind of layer has its own.

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise TypeError(
            f"{name} has no constructor: it is made from a layer with weights. Call quantize_model(model, config) on "
            f"a model, or {name}.from_float(layer, bits, dtype) and `nn.conversion.pack_weight` on a single layer."
        )

    @classmethod
    def from_float(
        cls: type[LayerT],
        layer: nn.Linear | nn.Conv2d,
        bits: int,
        dtype: torch.dtype,
        branch_rank: int = 0,
        scale_dtype: str = "float32",
    ) -> LayerT:
        """Make the packed layer for a Linear or Conv2d, without codes yet.

        Args:
            layer: whose geometry it takes, and whose bias it shares; its weight may be on the meta device.
            bits: 1 to 8.
            dtype: that reading `weight` gives.
            branch_rank: of the low-rank branch; 0 for none.
            scale_dtype: "float32" or "bfloat16", to which scales are rounded.

        Returns:
            The layer, with codes, scale and branch on the meta device.
        """
        packed = without_weight(cls, layer)
        packed.bits = bits
        packed.weight_shape = tuple(layer.weight.shape)
        packed.weight_dtype = dtype
        packed.scale_dtype = scale_dtype
        rows, columns = packed.weight_shape[0], packed.columns
        with torch.device("meta"):
            packed.codes = nn.Parameter(
                torch.empty(rows, dense_width(columns, bits), dtype=torch.uint8), requires_grad=False
            )
            packed.scale = float_bits(torch.empty(rows))
        down, up = branch_shapes(packed.weight_shape, branch_rank)
        with torch.device("meta"):
            packed._set_branch(torch.empty(down, dtype=dtype), torch.empty(up, dtype=dtype))
        return packed

    @property
    def columns(self) -> int:
        """Weights an output channel has."""
        return torch.Size(self.weight_shape[1:]).numel()

    def set_codes(self, codes: Tensor, scale: Tensor) -> None:
        """Take codes uint8 [out, dense_width(columns, bits)] and scale fp32 [out]."""
        self.codes = nn.Parameter(codes, requires_grad=False)
        self._set_scale(scale)

    def _set_scale(self, scale: Tensor) -> None:
        self.scale = float_bits(round_scale(scale, self.scale_dtype))

    def set_rows(self, scale: Tensor, branch_up: Tensor | None) -> None:
        """Take scale fp32 [out] and, if it is not None, branch_up floating [out, rank, ...], in place of what was."""
        self._set_scale(scale.to(self.codes.device))
        if branch_up is not None:
            self._set_branch(self.branch_down, branch_up.to(self.branch_up))
        self._renew_int8_weight()

    @property
    def scale_bits(self) -> Tensor:
        """The scales as operators take them: the bits of fp32, int32 [out]."""
        return self.scale.view(-1)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Return the weight of the codes in `dtype`, a new tensor."""
        return decode_weight(self.codes, self.scale_bits.view(torch.float32), self.bits, self.weight_shape, dtype)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that the layer applies, branch included, rounded once to `dtype`; a new tensor."""
        return _dense_weight(self.decode, self.branch_down, self.branch_up, dtype)

    def _lazy_weight(self) -> Tensor:
        """`dense_weight` in `weight_dtype`, decoded where it is used."""
        decode = functools.partial(weight, self.codes, self.scale_bits, self.bits, self.weight_shape)
        dense = functools.partial(_dense_weight, decode, self.branch_down, self.branch_up, self.weight_dtype)
        if torch.compiler.is_compiling():  # A compiler removes the operators where only metadata are asked for.
            return dense()
        like = torch.empty(self.weight_shape, dtype=self.weight_dtype, device="meta")
        return LazyWeight(dense, like, self.codes.device, owner=self)

    def select_kernel(self, compute: str | None = None, resident: str | None = None) -> KernelSelection:
        """How `forward` computes, or would with other settings; raises as `ops.dispatch.select_for_layer`."""
        settings = compute or self.compute, resident or self.resident
        return select_for_layer(*settings, self.bits, self.codes.device, self.sensitive, isinstance(self, nn.Linear))

    def set_compute(self, compute: str, resident: str) -> None:
        """Change how `forward` computes; see `diffusers_bitsfusion.set_compute`, raises as `ops.dispatch`."""
        self.computes_int8 = self.select_kernel(compute, resident).arithmetic == "int8"
        self.compute, self.resident = compute, resident
        self._renew_int8_weight()

    def _renew_int8_weight(self) -> None:
        keep = self.computes_int8 and self.resident == "int8" and not self.codes.is_meta
        self.int8_weight = self._make_int8_weight() if keep else None

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Any:
        before = self.codes.device
        super()._apply(fn, recurse)
        if self.codes.device != before and not self.codes.is_meta:
            self.set_compute(self.compute, self.resident)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.int8_weight is not None:
            self._renew_int8_weight()

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.int8_weight = None  # It is on the device of the first replica; others decode in each call.
        return replica

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's layouts can neither be deep-copied nor pickled: they are made anew.
        return {name: value for name, value in self.__dict__.items() if name != "int8_weight"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.computes_int8:  # This machine may use another kernel.
            self.set_compute(self.compute, self.resident)

    def __getattr__(self, name: str) -> Any:
        # `weight` is no property of the class, since the constructor of nn.Linear assigns it.
        # Replicas for several devices (`nn.DataParallel`) have parameters as plain attributes.
        if name == "weight" and ("codes" in self._parameters or "codes" in self.__dict__):
            return self._lazy_weight()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "codes" in self.__dict__.get("_parameters", ()):
            refuse_assigning(self, value)
            return
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Return what a printed model shows of the layer."""
        return f"{super().extra_repr()}, bits={self.bits}"


def _dense_weight(
    decode: Callable[[torch.dtype], Tensor], down: Tensor | None, up: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if down is None or up is None:
        return decode(dtype)
    bare = decode(torch.float32)
    return (bare + (up.detach().float().flatten(1) @ down.detach().float().flatten(1)).view_as(bare)).to(dtype)


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
