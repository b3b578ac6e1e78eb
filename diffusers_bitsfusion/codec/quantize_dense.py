"""Weights to packed codes and scales by the fastest way there is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native.library import NATIVE_DTYPES, native_library
from .radix import dense_width, pack_dense
from .rounding import Rounding
from .scales import GAUSSIAN_STEP, check_finite, num_starts, quantize_rows


def quantize_to_dense(weight: Tensor, bits: int, rounding: Rounding = Rounding()) -> tuple[Tensor, Tensor]:
    """Like `scales.quantize_rows`, with the codes packed.

    Compiled on a CPU for the alternation, else plain torch; the two sum in different orders, so that their scales
    may differ in the last bits.

    Returns:
        dense uint8 [rows, dense_width(columns, bits)], scale fp32 [rows].

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    native = native_library() if weight.device.type == "cpu" and weight.dtype in NATIVE_DTYPES else None
    if native is None or rounding.scale_init != "alternating":
        codes, scale = quantize_rows(weight, bits, rounding)
        return pack_dense(codes, bits), scale
    weight = weight.contiguous()
    rows, columns = weight.shape
    dense = torch.empty(rows, dense_width(columns, bits), dtype=torch.uint8, device="cpu")
    scale = torch.empty(rows, dtype=torch.float32, device="cpu")
    gaussian_step = torch.tensor(GAUSSIAN_STEP[rounding.balance][bits - 1], dtype=torch.float32, device="cpu")
    native.quantize(
        rows,
        columns,
        *(tensor.data_ptr() for tensor in (weight, dense, scale, gaussian_step)),
        columns,
        dense.shape[1],
        NATIVE_DTYPES[weight.dtype],
        bits,
        rounding.balance,
        num_starts(bits),
        rounding.iterations,
    )
    check_finite(scale)
    return dense, scale
