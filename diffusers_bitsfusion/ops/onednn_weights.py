"""Weights as oneDNN's integer convolution reads them, written by loops of our own.

oneDNN lays out a weight by a generic loop, at about 0.3 GB/s, which took a third of a call of Stable Diffusion's UNet
with packed weights. The layout that it chooses for convolutions without groups is a simple one ([blocks of outputs,
taps, inputs / 4, outputs of a block, 4], then the sums that a zero point needs), so a tensor of the shape that there
is already, or a copy of it, is written over. oneDNN does not promise the layout: that a tensor has this one is
checked, byte by byte, when the first of its shape is made, and where it has not, oneDNN lays out every weight.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..native.library import NativeLibrary, native_library

# Outputs of a block; how many oneDNN takes depends on the shape and the processor.
_BLOCKS = (64, 48, 32, 16)

# Codes that are drawn for a probe and then repeated: a prime, which no layout's strides share.
_PERIOD = 65521

# The block of each shape's layout, None where that is another one.
_block_of: dict[Any, int | None] = {}
# A tensor of each shape: written over by this thread's next call, and kept by a model.
_scratch = threading.local()
_kept: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()


def lay_out(plain: Tensor, scale: Tensor, geometry: Sequence[Any]) -> Tensor:
    """Codes in an opaque layout of oneDNN, which is the tensor's own.

    Args:
        plain: int8 [out, in / groups, kernel height, kernel width].
        scale: fp32 [out].
        geometry: stride, padding, dilation and groups of the convolution.
    """
    key = _key(plain, geometry)
    alike = _kept.get(key) if _block_of.get(key) is not None else None
    tensor = _lay_out_into(None if alike is None else alike.clone(), key, plain, scale, geometry)
    _kept[key] = tensor
    return tensor


def lay_out_in_place(plain: Tensor, scale: Tensor, geometry: Sequence[Any]) -> Tensor:
    """Like `lay_out`, where that can be into a tensor that the next such call on this thread overwrites.

    Only for use within one operator; see `decode.decode_to_scratch`.
    """
    tensors: dict[Any, Tensor] = _scratch.__dict__.setdefault("tensors", {})
    key = _key(plain, geometry)
    with torch.inference_mode(False):  # the tensor outlives an inference mode that this call may be under
        tensor = _lay_out_into(tensors.get(key), key, plain, scale, geometry)
    if _block_of.get(key) is not None:
        tensors[key] = tensor
    return tensor


def lay_out_by_onednn(plain: Tensor, scale: Tensor, geometry: Sequence[Any]) -> Tensor:
    """`lay_out` by oneDNN alone."""
    # A zero point that is not zero asks for the layout that serves one.
    return torch.ops.onednn.qconv_prepack(plain, scale, 1.0, 1, *geometry, None)


def _key(plain: Tensor, geometry: Sequence[Any]) -> Any:
    return (tuple(plain.shape), *(tuple(part) if isinstance(part, Sequence) else part for part in geometry))


def _lay_out_into(tensor: Tensor | None, key: Any, plain: Tensor, scale: Tensor, geometry: Sequence[Any]) -> Tensor:
    """Codes in `tensor`, which is one of their `key`, where its layout is known; else in a new one."""
    native = native_library()
    if native is None:
        return lay_out_by_onednn(plain, scale, geometry)
    if key not in _block_of:
        probe = _probe(plain.shape)
        tensor = lay_out_by_onednn(probe, scale, geometry)
        fitting = (block for block in _BLOCKS if _has_blocks_of(native, tensor, probe, block))
        _block_of[key] = next(fitting, None)
    block = _block_of[key]
    if tensor is None or block is None:
        return lay_out_by_onednn(plain, scale, geometry)
    _write(native, plain, torch.ops.mkldnn.data_ptr(tensor), block)
    return tensor


def _probe(shape: torch.Size) -> Tensor:
    """Codes that fit one layout alone, as zeros do not."""
    generator = torch.Generator("cpu").manual_seed(0)  # whatever torch's default device is now
    drawn = torch.randint(-127, 128, (_PERIOD,), dtype=torch.int8, generator=generator, device="cpu")
    return drawn.repeat(-(-shape.numel() // _PERIOD))[: shape.numel()].view(shape)


def _has_blocks_of(native: NativeLibrary, tensor: Tensor, plain: Tensor, block: int) -> bool:
    outputs, inputs, *kernel = plain.shape
    rows, columns = -(-outputs // block) * block, -(-inputs // 4) * 4 * torch.Size(kernel).numel()
    if torch.ops.mkldnn._nbytes(tensor) != rows * (columns + 4):
        return False
    expected = torch.zeros(rows * (columns + 4), dtype=torch.int8, device="cpu")
    _write(native, plain, expected.data_ptr(), block)
    found = (ctypes.c_int8 * expected.numel()).from_address(torch.ops.mkldnn.data_ptr(tensor))
    return torch.equal(torch.frombuffer(found, dtype=torch.int8), expected)


def _write(native: NativeLibrary, plain: Tensor, address: int, block: int) -> None:
    outputs, inputs, *kernel = plain.shape
    taps = torch.Size(kernel).numel()
    sizes = outputs, inputs, taps, block
    native.block_weight(-(-outputs // block), block * inputs * taps, plain.data_ptr(), address, *sizes)
