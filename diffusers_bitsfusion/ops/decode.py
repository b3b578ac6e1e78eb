"""Packed codes and scales to weights: the plain reference, the compiled way, and the choice between them."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..codec.native import for_row_ranges, native_library
from ..codec.radix import code_planes

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)

_scratch = threading.local()


def decode_reference(codes: Tensor, scale: Tensor, bits: int, columns: int, out: Tensor) -> Tensor:
    """Weights `scale * code`, rounded once to the output's dtype; plain torch on any device.

    Args:
        codes: uint8 [rows, dense_width(columns, bits)], the dense form of `codec.radix`.
        scale: fp32 [rows].
        bits: 1 to 8.
        columns: weights a row.
        out: floating [rows, columns], written and returned.
    """
    factor = scale.unsqueeze(1)
    for start, plane in code_planes(codes, bits, columns):
        out[:, start : start + plane.shape[1]] = (plane * factor).to(out.dtype)
    return out


def decode(codes: Tensor, scale: Tensor, bits: int, columns: int, out: Tensor) -> Tensor:
    """`decode_reference` by the fastest way there is for the device and dtype; same arguments, same bits."""
    native = native_library() if codes.device.type == "cpu" else None
    if native is None or not (codes.is_contiguous() and scale.is_contiguous() and out.is_contiguous()):
        return decode_reference(codes, scale, bits, columns, out)
    if out.dtype not in _NATIVE_DTYPES:
        return out.copy_(decode(codes, scale, bits, columns, torch.empty(out.shape)))
    width = codes.shape[1]

    def decode_rows(start: int, stop: int) -> None:
        native.decode(
            codes.data_ptr() + start * width,
            scale.data_ptr() + start * scale.element_size(),
            out.data_ptr() + start * columns * out.element_size(),
            stop - start,
            columns,
            width,
            bits,
            out.dtype == torch.bfloat16,
        )

    for_row_ranges(decode_rows, codes.shape[0], columns)
    return out


def decode_weight(codes: Tensor, scale: Tensor, bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor of `shape` with the decoded weights; arguments as in `decode_reference`."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    decode(codes, scale, bits, out[0].numel(), out.view(shape[0], -1))
    return out


def decode_to_scratch(codes: Tensor, scale: Tensor, bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like `decode_weight`, into a buffer that the next call on this thread overwrites.

    Fresh memory costs more than decoding on a CPU (every page is faulted in and cleared), so one buffer of the
    largest layer serves all. Other devices allocate from their caching allocator, and a traced graph plans its own
    memory.
    """
    if codes.device.type != "cpu" or torch.compiler.is_compiling():
        return decode_weight(codes, scale, bits, shape, dtype)
    size = torch.Size(shape).numel() * dtype.itemsize
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # the buffer outlives an inference mode that this call may be under
            buffer = _scratch.buffer = torch.empty(size, dtype=torch.uint8)
    out = buffer[:size].view(dtype).view(shape)
    decode(codes, scale, bits, out[0].numel(), out.view(shape[0], -1))
    return out
