"""Weights as oneDNN's integer convolution reads them, written anew for each call by loops of our own.

oneDNN lays out a weight by a generic loop, at about 0.3 GB/s, which took a third of a call of Stable Diffusion's UNet
with packed weights. The layout that it chooses for convolutions without groups is a simple one ([blocks of outputs,
taps, inputs / 4, outputs of a block, 4], then the sums that a zero point needs), so one tensor for each shape is kept
and its memory written over. oneDNN does not promise the layout: that a tensor has this one is checked, byte by byte,
when it is made, and where it has not, oneDNN lays out every weight.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..codec.native import NativeLibrary, native_library

# Outputs of a block; how many oneDNN takes depends on the shape and the processor.
_BLOCKS = (64, 48, 32, 16)

_kept = threading.local()


def lay_out(plain: Tensor, scale: Tensor, geometry: Sequence[Any]) -> Tensor:
    """Codes in an opaque layout of oneDNN, which is the tensor's own.

    Args:
        plain: int8 [out, in / groups, kernel height, kernel width].
        scale: fp32 [out].
        geometry: stride, padding, dilation and groups of the convolution.
    """
    # A zero point that is not zero asks for the layout that serves one.
    return torch.ops.onednn.qconv_prepack(plain, scale, 1.0, 1, *geometry, None)


def lay_out_in_place(plain: Tensor, scale: Tensor, geometry: Sequence[Any]) -> Tensor:
    """Like `lay_out`, where that can be into a tensor that the next such call on this thread overwrites.

    Only for use within one operator; see `decode.decode_to_scratch`.
    """
    native = native_library()
    if native is None:
        return lay_out(plain, scale, geometry)
    key = (tuple(plain.shape), *(tuple(part) if isinstance(part, Sequence) else part for part in geometry))
    tensors: dict[Any, tuple[Tensor, int] | None] = _kept.__dict__.setdefault("tensors", {})
    if key in tensors:
        kept = tensors[key]
        if kept is None:  # a layout that we do not know
            return lay_out(plain, scale, geometry)
        tensor, block = kept
        _write(native, plain, torch.ops.mkldnn.data_ptr(tensor), block)
        return tensor
    with torch.inference_mode(False):  # what is kept outlives an inference mode that this call may be under
        # Not the weight itself: one of zeros, for example, would fit any layout.
        probe = torch.randint(-127, 128, plain.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
        tensor = lay_out(probe, scale, geometry)
    fitting = [block for block in _BLOCKS if _has_blocks_of(native, tensor, probe, block)]
    tensors[key] = (tensor, fitting[0]) if fitting else None
    return lay_out_in_place(plain, scale, geometry)


def _has_blocks_of(native: NativeLibrary, tensor: Tensor, plain: Tensor, block: int) -> bool:
    outputs, inputs, *kernel = plain.shape
    rows, columns = -(-outputs // block) * block, -(-inputs // 4) * 4 * torch.Size(kernel).numel()
    if torch.ops.mkldnn._nbytes(tensor) != rows * (columns + 4):
        return False
    expected = torch.zeros(rows * (columns + 4), dtype=torch.int8)
    _write(native, plain, expected.data_ptr(), block)
    found = (ctypes.c_int8 * expected.numel()).from_address(torch.ops.mkldnn.data_ptr(tensor))
    return torch.equal(torch.frombuffer(found, dtype=torch.int8), expected)


def _write(native: NativeLibrary, plain: Tensor, address: int, block: int) -> None:
    outputs, inputs, *kernel = plain.shape
    taps = torch.Size(kernel).numel()
    sizes = outputs, inputs, taps, block
    native.block_weight(-(-outputs // block), block * inputs * taps, plain.data_ptr(), address, *sizes)
