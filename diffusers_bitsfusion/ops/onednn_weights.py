"""Weights as oneDNN's integer convolution reads them, written by compiled loops of this package.

oneDNN lays out a weight by a generic loop, at about 0.3 GB/s, which took a third of a call of Stable Diffusion's UNet
with packed weights. The layout that it chooses for convolutions without groups is a simple one ([blocks of outputs,
taps, inputs / 4, outputs of a block, 4], then the sums that a zero point needs), so a tensor of the layout that there
is already, or a copy of it, is written over. oneDNN does not promise the layout: that a tensor has this one is
checked, byte by byte, when the first of its shape is made, and where it has not, oneDNN lays out every weight.

The size of a block depends on the shape, the processor and the number of threads. Layouts are therefore remembered for
the settings under which they were found, and before anything is written over, the tensor's own descriptor is compared
with the one that was checked. A tensor that was laid out under other settings stays right, since oneDNN reorders what
it does not want, but only by its generic loop: `is_current` tells when it is better to lay out the codes anew.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..native.arguments import BlockArguments
from ..native.library import NativeLibrary, native_library

# Outputs of a block; how many oneDNN takes depends on the shape, the processor and the number of threads.
_BLOCKS = (64, 48, 32, 16)

# Codes that are drawn for a probe and then repeated: a prime, which no layout's strides share.
_PERIOD = 65521


@dataclass(frozen=True)
class _Layout:
    """What oneDNN makes of a shape: its own description, and the outputs of a block, None for any other layout."""

    descriptor: bytes
    block: int | None


# Layouts of weights by settings, shape and geometry.
_layouts: dict[Any, _Layout] = {}
# A tensor of each of these: written over by this thread's next call, and kept by a model.
_scratch = threading.local()
_kept: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()
# The settings under which the tensors that models keep were laid out.
_settings_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def lay_out(plain: Tensor, scale: Tensor, geometry: Sequence[Any]) -> Tensor:
    """Codes in an opaque layout of oneDNN, which is the tensor's own.

    Args:
        plain: int8 [out, in / groups, kernel height, kernel width].
        scale: fp32 [out].
        geometry: stride, padding, dilation and groups of the convolution.
    """
    settings = current_settings()
    key = _key(settings, plain, geometry)
    alike = _kept.get(key)
    tensor = _lay_out_into(None if alike is None else alike.clone(), key, plain, scale, geometry)
    _kept[key] = tensor
    _settings_of[tensor] = settings
    return tensor


def lay_out_in_place(plain: Tensor, scale: Tensor, geometry: Sequence[Any]) -> Tensor:
    """Like `lay_out`, where that can be into a tensor that the next such call on this thread overwrites.

    Only for use within one operator; see `decode.decode_to_scratch`.
    """
    settings = current_settings()
    if getattr(_scratch, "settings", None) != settings:  # tensors of other settings would only take memory
        _scratch.settings, _scratch.tensors = settings, {}
    tensors: dict[Any, Tensor] = _scratch.tensors
    key = _key(settings, plain, geometry)
    with torch.inference_mode(False):  # the tensor outlives an inference mode that this call may be under
        tensor = _lay_out_into(tensors.get(key), key, plain, scale, geometry)
    if key in _layouts and _layouts[key].block is not None:
        tensors[key] = tensor
    return tensor


def lay_out_by_onednn(plain: Tensor, scale: Tensor, geometry: Sequence[Any]) -> Tensor:
    """`lay_out` by oneDNN alone."""
    # A zero point that is not zero asks for the layout that serves one.
    return torch.ops.onednn.qconv_prepack(plain, scale, 1.0, 1, *geometry, None)


def is_current(tensor: Tensor) -> bool:
    """Whether a tensor that `lay_out` gave was laid out under the settings that hold now."""
    return _settings_of.get(tensor) == current_settings()


def current_settings() -> tuple[Any, ...]:
    """What oneDNN's choice depends on, beside the convolution and the processor, on this thread now."""
    return (
        torch.get_num_threads(),
        torch.backends.mkldnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )


def _key(settings: tuple[Any, ...], plain: Tensor, geometry: Sequence[Any]) -> Any:
    parts = (tuple(part) if isinstance(part, Sequence) else part for part in geometry)
    return (settings, tuple(plain.shape), *parts)


def _lay_out_into(tensor: Tensor | None, key: Any, plain: Tensor, scale: Tensor, geometry: Sequence[Any]) -> Tensor:
    """Codes in `tensor`, where it has the layout that is known for `key`; else in a new one."""
    native = native_library()
    if native is None:
        return lay_out_by_onednn(plain, scale, geometry)
    if key not in _layouts:
        probe = _probe(plain.shape)
        tensor = lay_out_by_onednn(probe, scale, geometry)
        fitting = (block for block in _BLOCKS if _has_blocks_of(native, tensor, probe, block))
        _layouts[key] = _Layout(_descriptor(tensor), next(fitting, None))
    layout = _layouts[key]
    if tensor is None or layout.block is None or not _has_layout(tensor, plain.shape, layout):
        return lay_out_by_onednn(plain, scale, geometry)
    _write(native, plain, torch.ops.mkldnn.data_ptr(tensor), layout.block)
    return tensor


def _has_layout(tensor: Tensor, shape: torch.Size, layout: _Layout) -> bool:
    """Whether a loop that writes weights of `shape` in `layout` stays within `tensor` and fills it rightly."""
    assert layout.block is not None
    fits = torch.ops.mkldnn._nbytes(tensor) == _size(shape, layout.block)
    return fits and _descriptor(tensor) == layout.descriptor


def _descriptor(tensor: Tensor) -> bytes:
    """oneDNN's own description of a tensor: dtype, sizes, strides, blocks, and the sums after them."""
    return torch.ops.mkldnn._get_mkldnn_serialized_md(tensor).numpy().tobytes()


def _probe(shape: torch.Size) -> Tensor:
    """Codes that fit one layout alone, as zeros do not."""
    generator = torch.Generator("cpu").manual_seed(0)  # whatever torch's default device is now
    drawn = torch.randint(-127, 128, (_PERIOD,), dtype=torch.int8, generator=generator, device="cpu")
    return drawn.repeat(-(-shape.numel() // _PERIOD))[: shape.numel()].view(shape)


def _has_blocks_of(native: NativeLibrary, tensor: Tensor, plain: Tensor, block: int) -> bool:
    size = _size(plain.shape, block)
    if torch.ops.mkldnn._nbytes(tensor) != size:
        return False
    expected = torch.zeros(size, dtype=torch.int8, device="cpu")
    _write(native, plain, expected.data_ptr(), block)
    found = (ctypes.c_int8 * size).from_address(torch.ops.mkldnn.data_ptr(tensor))
    return torch.equal(torch.frombuffer(found, dtype=torch.int8), expected)


def _size(shape: torch.Size, block: int) -> int:
    """Bytes of a weight of `shape` in blocks, with the sums after them."""
    outputs, inputs, *kernel = shape
    rows, columns = -(-outputs // block) * block, -(-inputs // 4) * 4 * torch.Size(kernel).numel()
    return rows * (columns + 4)


def _write(native: NativeLibrary, plain: Tensor, address: int, block: int) -> None:
    outputs, inputs, *kernel = plain.shape
    taps = torch.Size(kernel).numel()
    arguments = BlockArguments(
        plain=plain.data_ptr(), blocked=address, outputs=outputs, inputs=inputs, taps=taps, block=block
    )
    native.block_weight(-(-outputs // block), block * inputs * taps, arguments)
