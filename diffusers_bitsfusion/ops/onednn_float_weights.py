"""Weights as oneDNN reads them in floating point, decoded straight into that layout.

torch gives oneDNN a plain weight, which it lays out anew in every call: for Stable Diffusion's UNet 1.7 GB, and on its
small images more time than the products take. The layout that it chooses for linear layers, and for convolutions
without groups, is a simple one ([blocks of outputs, taps, inputs / pack, outputs of a block, pack], where `pack`
values take four bytes), which `native/decode_blocked.c` writes. oneDNN does not promise it: the first weight of each
shape is laid out by oneDNN and compared byte by byte, and where it differs the layout is left to oneDNN. As for
integers (`onednn_weights.py`), layouts are remembered for the settings under which they were found. Only tensors that
were compared are written over.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .decode import decode_into_blocks
from .onednn_weights import current_settings

# Outputs of a block, of which oneDNN chooses.
_BLOCKS = (64, 48, 32, 24, 16, 8)

# Number of random codes of a probe, which repeats them: a prime, which no layout's strides share.
_PERIOD = 65521


# Outputs of a block by settings, dtype, shapes of weight and input, and geometry; None for any other layout.
_blocks_of: dict[Any, int | None] = {}
# A tensor of each shape, dtype and block, which this thread's next call writes over.
_scratch = threading.local()


@dataclass(frozen=True)
class PackedOperand:
    """A packed weight and what it is for.

    Attributes:
        codes: uint8 [out, dense_width(in * kernel, bits)], the dense form of `codec.radix`.
        scale: fp32 [out].
        bits: 1 to 8.
        shape: (out, in), or (out, in, kernel height, kernel width).
        geometry: of a convolution stride, padding, dilation as pairs, and groups; None of a linear layer.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    shape: tuple[int, ...]
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int] | None = None


def prepack_in_place(packed: PackedOperand, x: Tensor) -> Tensor | None:
    """Return the weight in oneDNN's layout and the dtype of `x`, for `torch.ops.mkldnn`.

    It is a tensor that the next such call on this thread overwrites: only for use within one operator.

    Args:
        packed: the weight.
        x: fp32 or bf16 [batch, in, height, width] or [tokens, in] on a CPU, at least one value.

    Returns:
        An opaque tensor; None where the layout is not known.
    """
    if not packed.codes.is_contiguous() or not packed.scale.is_contiguous():
        return None
    settings = current_settings()
    if getattr(_scratch, "settings", None) != settings:  # Tensors of other settings would only take memory.
        _scratch.settings, _scratch.tensors = settings, {}
    tensors: dict[Any, Tensor] = _scratch.tensors
    key = (settings, x.dtype, x.shape, packed.shape, str(packed.geometry))
    tensor = tensors.get((packed.shape, x.dtype, _blocks_of.get(key)))
    if tensor is None and _blocks_of.get(key, 0) is not None:
        with torch.inference_mode(False):  # The tensor outlives an inference mode that this call may be under.
            tensor, _blocks_of[key] = _probe(packed, x)
        if _blocks_of[key] is not None:
            tensor = tensors.setdefault((packed.shape, x.dtype, _blocks_of[key]), tensor)
    block = _blocks_of[key]
    if tensor is None or block is None:
        return None
    _write(packed, x.dtype, torch.ops.mkldnn.data_ptr(tensor), block)
    return tensor


def _by_onednn(plain: Tensor, packed: PackedOperand, x: Tensor) -> Tensor:
    if packed.geometry is None:
        reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(plain, len(x))
    else:
        stride, padding, dilation, groups = packed.geometry
        reorder = torch.ops.aten.mkldnn_reorder_conv2d_weight
        reordered = reorder(plain.to_mkldnn(), padding, stride, dilation, groups, x.shape)
    return reordered


def _probe(packed: PackedOperand, x: Tensor) -> tuple[Tensor, int | None]:
    """Codes as oneDNN lays them out, and the outputs of a block; the codes fit one layout alone, as zeros do not."""
    rows, columns = packed.shape[0], torch.Size(packed.shape[1:]).numel()
    generator = torch.Generator("cpu").manual_seed(0)  # torch's default device may be another one.
    drawn = torch.randint(0, 255, (_PERIOD,), dtype=torch.uint8, generator=generator, device="cpu")
    codes = drawn.repeat(-(-rows * columns // _PERIOD))[: rows * columns].view(rows, columns)
    ones = torch.ones(rows, dtype=torch.float32, device="cpu")
    plain = PackedOperand(codes, ones, 8, packed.shape, packed.geometry)
    tensor = _by_onednn((codes.to(x.dtype) - 127).view(packed.shape), packed, x)
    return tensor, next((block for block in _BLOCKS if _has_blocks_of(tensor, plain, x.dtype, block)), None)


def _has_blocks_of(tensor: Tensor, packed: PackedOperand, dtype: torch.dtype, block: int) -> bool:
    size = _size(packed.shape, dtype, block)
    if torch.ops.mkldnn._nbytes(tensor) != size:
        return False
    expected = torch.zeros(size, dtype=torch.uint8, device="cpu")
    _write(packed, dtype, expected.data_ptr(), block)
    found = (ctypes.c_uint8 * size).from_address(torch.ops.mkldnn.data_ptr(tensor))
    return torch.equal(torch.frombuffer(found, dtype=torch.uint8), expected)


def _size(shape: tuple[int, ...], dtype: torch.dtype, block: int) -> int:
    """Bytes of a weight of `shape` in blocks."""
    outputs, inputs, *kernel = shape
    return -(-outputs // block) * block * torch.Size(kernel).numel() * -(-inputs * dtype.itemsize // 4) * 4


def _write(packed: PackedOperand, dtype: torch.dtype, address: int, block: int) -> None:
    decode_into_blocks(packed.codes, packed.scale, packed.bits, packed.shape, dtype, block, address)
