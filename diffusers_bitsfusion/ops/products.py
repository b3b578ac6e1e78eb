"""Integer products of tokens and codes on a CPU: a plain reference and the fast kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native.arguments import ProductArguments
from ..native.library import native_library
from ..utils.private_names import TORCH_INT_MM
from .kernels import INTEGER_PRODUCTS, MULTIPLY_COMPILED, select

# Products that are worth another thread; a thread computes some 40 a nanosecond.
_PRODUCTS_PER_THREAD = 1 << 22


def int_mm_reference(tokens: Tensor, weight: Tensor, sums: Tensor) -> Tensor:
    """Multiply tokens by weightᵀ.

    Args:
        tokens: int8 [tokens, in], contiguous.
        weight: int8 [out, in], contiguous.
        sums: int32 [at least tokens, out]; its first rows are written and returned.
    """
    sums = sums[: len(tokens)]
    # For single columns, whose strides are ambiguous, `_int_mm` leaves its output unset (pytorch/pytorch#195066).
    if weight.shape[1] == 1:
        return torch.mul(tokens.to(torch.int32), weight.T, out=sums)
    product: Tensor = TORCH_INT_MM.require(torch)(tokens, weight.T, out=sums)
    return product


def int_mm(tokens: Tensor, weight: Tensor, bits: int, sums: Tensor) -> Tensor:
    """Multiply as `int_mm_reference` by the fastest kernel; `weight`: codes of `bits`, without VNNI at most 7."""
    compiled = select(INTEGER_PRODUCTS, tokens.device, bits=bits) is MULTIPLY_COMPILED
    native = native_library() if compiled else None
    if native is None or native.multiply is None:
        return int_mm_reference(tokens, weight, sums)
    sums = sums[: len(tokens)]
    rows, columns = weight.shape
    arguments = ProductArguments(
        tokens=tokens.data_ptr(),
        weight=weight.data_ptr(),
        sums=sums.data_ptr(),
        columns=columns,
        out=rows,
        bits=bits,
    )
    native.multiply(len(tokens), weight.numel(), arguments, per_thread=_PRODUCTS_PER_THREAD)
    return sums
