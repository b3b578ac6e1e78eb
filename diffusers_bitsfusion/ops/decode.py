"""Packed codes and scales to weights: the plain reference and the faster kernels."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..codec.radix import code_planes
from ..native.arguments import DecodeArguments, DecodeBlockedArguments
from ..native.library import NATIVE_DTYPES, native_library
from .kernels import DECODE_COMPILED, DECODE_TRITON, DECODING, select

_NATIVE_OUTPUTS = (torch.float32, torch.bfloat16, torch.int8)

# Weights that plain torch decodes at a time: few enough that its passes over them stay in a processor's cache.
_PLAIN_BLOCK = 1 << 20

# Bytes that compiled loops write in the time that another thread takes to start.
_BYTES_PER_THREAD = 1 << 16

# Outputs that the loop which writes blocks of them decodes at a time.
_LANES = 16

_scratch = threading.local()


def decode_reference(codes: Tensor, scale: Tensor, bits: int, columns: int, out: Tensor) -> Tensor:
    """Decode weights `scale * code`, rounded once to the output's dtype, or the codes alone; plain torch.

    Args:
        codes: uint8 [rows, dense_width(columns, bits)], the dense form of `codec.radix`.
        scale: fp32 [rows].
        bits: 1 to 8.
        columns: weights a row.
        out: [rows, columns], written and returned: weights if it is floating, codes if it is int8.
    """
    for start, plane in code_planes(codes, bits, columns):
        if out.dtype != torch.int8:
            plane.mul_(scale.unsqueeze(1))
        out[:, start : start + plane.shape[1]] = plane
    return out


def decode(codes: Tensor, scale: Tensor, bits: int, columns: int, out: Tensor) -> Tensor:
    """Decode as `decode_reference` by the fastest kernel for the device and dtype; same arguments, same bits."""
    contiguous = codes.is_contiguous() and scale.is_contiguous() and out.is_contiguous()
    if contiguous and _has_kernel(codes.device, out.dtype):
        from .triton.decode import decode_triton  # It imports Triton, which takes a second and may be missing.

        return decode_triton(codes, scale, bits, columns, out)
    if codes.device.type != "cpu":
        return decode_reference(codes, scale, bits, columns, out)
    native = native_library() if select(DECODING, codes.device, out.dtype) is DECODE_COMPILED else None
    if native is None or not contiguous:
        return _decode_in_blocks(codes, scale, bits, columns, out)
    if out.dtype not in _NATIVE_OUTPUTS:
        weights = torch.empty(
            out.shape, dtype=torch.float32, device="cpu"
        )  # torch's default device may be another one.
        return out.copy_(decode(codes, scale, bits, columns, weights))
    arguments = DecodeArguments(
        dense=codes.data_ptr(),
        scale=scale.data_ptr(),
        out=out.data_ptr(),
        columns=columns,
        row_bytes_in=codes.shape[1],
        bits=bits,
        kind=NATIVE_DTYPES[out.dtype],
    )
    native.decode(len(codes), columns * out.element_size(), arguments, per_thread=_BYTES_PER_THREAD)
    return out


def _decode_in_blocks(codes: Tensor, scale: Tensor, bits: int, columns: int, out: Tensor) -> Tensor:
    rows = max(1, _PLAIN_BLOCK // columns)
    for start in range(0, codes.shape[0], rows):
        part = slice(start, start + rows)
        decode_reference(codes[part], scale[part], bits, columns, out[part])
    return out


def decode_into_blocks(
    codes: Tensor, scale: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype, block: int, address: int
) -> None:
    """Decode a weight in blocks of outputs, by the compiled loop, without which it must not be called.

    Args:
        codes, scale, bits: as in `decode_reference`, contiguous.
        shape: (out, in) or (out, in, kernel height, kernel width).
        dtype: fp32, bf16, or int8 for the codes.
        block: outputs of a block, a multiple of 8.
        address: of the memory that is written: [ceil(out / block), kernel height * kernel width, ceil(in / pack),
            block, pack], where `pack` values take four bytes; after codes minus the sum of each output's, int32. What
            fills up the last block is left as it is.

    Raises:
        MemoryError: there is none for the loop to work in.
    """
    outputs, inputs, *kernel = shape
    taps = torch.Size(kernel).numel()
    arguments = DecodeBlockedArguments(
        dense=codes.data_ptr(),
        scale=scale.data_ptr(),
        blocked=address,
        outputs=outputs,
        inputs=inputs,
        taps=taps,
        row_bytes_in=codes.shape[1],
        bits=bits,
        kind=NATIVE_DTYPES[dtype],
        block=block,
    )
    native = native_library()
    assert native is not None
    row_bytes = _LANES * inputs * taps * dtype.itemsize
    native.decode_blocked(-(-outputs // _LANES), row_bytes, arguments, per_thread=_BYTES_PER_THREAD)


def decode_weight(codes: Tensor, scale: Tensor, bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a new tensor of `shape` with the decoded weights; arguments as in `decode_reference`."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    decode(codes, scale, bits, out[0].numel(), out.view(shape[0], -1))
    return out


def decode_channels_last(
    codes: Tensor, scale: Tensor, bits: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Decode as `decode_weight`, of a convolution [out, in, height, width], in channels-last memory."""
    if not _has_kernel(codes.device, dtype):
        return decode_weight(codes, scale, bits, shape, dtype).contiguous(memory_format=torch.channels_last)
    from .triton.decode import decode_triton

    out = torch.empty(shape, dtype=dtype, device=codes.device, memory_format=torch.channels_last)
    rows, columns, positions = shape[0], out[0].numel(), shape[2] * shape[3]
    ordered = out.permute(0, 2, 3, 1).view(rows, columns)
    decode_triton(codes.contiguous(), scale.contiguous(), bits, columns, ordered, positions)
    return out


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return select(DECODING, device, dtype) is DECODE_TRITON


def scratch(size: int) -> Tensor:
    """Return `size` bytes on a CPU, uint8 [size], that the next call on this thread overwrites."""
    buffer: Tensor | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # The buffer outlives an inference mode that this call may be under.
            buffer = _scratch.buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
    return buffer[:size]


def decode_to_scratch(codes: Tensor, scale: Tensor, bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Decode as `decode_weight`, into a buffer that the next call on this thread overwrites.

    Fresh memory costs more than decoding on a CPU (every page is faulted in and cleared), so one buffer of the
    largest layer serves all. Other devices allocate from their caching allocator. Only for use within one operator,
    which a compiled graph calls as a whole: the buffer never leaves it.
    """
    if codes.device.type != "cpu":
        return decode_weight(codes, scale, bits, shape, dtype)
    size = torch.Size(shape).numel() * dtype.itemsize
    out = scratch(size).view(dtype).view(shape)
    decode(codes, scale, bits, out[0].numel(), out.view(shape[0], -1))
    return out
