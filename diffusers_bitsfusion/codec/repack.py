"""The file's form of codes to memory's by the fastest way there is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native.arguments import RepackArguments
from ..native.library import native_library
from .radix import dense_from_bytes, dense_width

_BITS = (2, 3, 4)  # of codes whose two forms differ


def repack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """`radix.dense_from_bytes` on a CPU; compiled where possible, and then on the calling thread alone.

    Bytes must be at most `largest_byte(bits)`, which the compiled loop does not check.
    """
    native = native_library()
    if native is None or bits not in _BITS:
        return dense_from_bytes(packed, bits, columns)
    packed = packed.contiguous()
    rows, row_bytes = packed.shape
    dense = torch.empty(rows, dense_width(columns, bits), dtype=torch.uint8, device="cpu")
    arguments = RepackArguments(
        packed=packed.data_ptr(),
        dense=dense.data_ptr(),
        columns=columns,
        row_bytes=row_bytes,
        row_bytes_out=dense.shape[1],
        bits=bits,
    )
    native.repack(rows, columns, arguments, per_thread=rows * columns)
    return dense
