"""Weights to packed codes and scales by the fastest way there is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native.arguments import QuantizeArguments
from ..native.library import NATIVE_DTYPES, native_library
from .radix import dense_width, pack_dense
from .rounding import Rounding
from .scales import GAUSSIAN_STEP, check_finite, num_starts, quantize_rows


def quantize_to_dense(weight: Tensor, bits: int, rounding: Rounding = Rounding()) -> tuple[Tensor, Tensor]:
    """Like `scales.quantize_rows`, with the codes packed.

    Compiled on a CPU for the alternation, else plain torch. Both add up in fp64 and round the sums once, so that
    they agree to the bit unless a sum lies within fp64's rounding of the middle of two fp32 numbers.

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
    arguments = QuantizeArguments(
        weight=weight.data_ptr(),
        dense=dense.data_ptr(),
        scale=scale.data_ptr(),
        columns=columns,
        row_bytes_out=dense.shape[1],
        dtype=NATIVE_DTYPES[weight.dtype],
        bits=bits,
        balance=rounding.balance,
        starts=num_starts(bits),
        iterations=rounding.iterations,
        gaussian_step=GAUSSIAN_STEP[rounding.balance][bits - 1],
    )
    native.quantize(rows, columns, arguments)
    check_finite(scale)
    return dense, scale
