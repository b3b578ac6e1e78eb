"""What stands in for the layers' operators where torch transforms a call, which they do not take part in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..utils.private_names import TORCH_FORWARD_LEVEL, TORCH_TRANSFORMS, TORCH_UNWRAP, TORCH_WRAPPED
from .decode import decode_weight


def in_transform() -> bool:
    """Return whether torch differentiates forwards or transforms the current call (`forward_ad`, `torch.func`).

    Operators of a package carry no tangents, and torch has no transforms of their derivatives. Forward mode has one
    level for the process, so that other threads compute exactly meanwhile, too.
    """
    level: int = TORCH_FORWARD_LEVEL.read(forward_ad, -1)
    transforms: Callable[[], bool] = TORCH_TRANSFORMS.read(torch._C, bool)
    return level >= 0 or transforms()


def all_values(x: Tensor) -> Tensor:
    """Return the values of `x` in all the calls that `torch.func` makes one of: within vmap, of more dimensions."""
    if torch.compiler.is_compiling():
        return x
    wrapped, unwrap = TORCH_WRAPPED.read(torch._C._functorch, lambda _: False), TORCH_UNWRAP
    while wrapped(x):
        x = unwrap.require(torch._C._functorch)(x)
    return x


@torch.library.custom_op(
    "bitsfusion::weight",
    mutates_args=(),
    schema="(Tensor codes, Tensor scale, int bits, SymInt[] shape, ScalarType dtype) -> Tensor",
)
def weight(codes: Tensor, scale: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the decoded weight for torch's own linear layer or convolution, by an operator that transforms accept.

    Args:
        codes: uint8 [out, dense_width(columns, bits)], the dense form of `codec.radix`.
        scale: int32 [out], the bits of the fp32 scales.
        bits: 1 to 8.
        shape: of the weight.
        dtype: of the weight, floating.
    """
    return decode_weight(codes, scale.view(torch.float32), bits, tuple(shape), dtype)


@weight.register_fake
def _(codes: Tensor, scale: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)
