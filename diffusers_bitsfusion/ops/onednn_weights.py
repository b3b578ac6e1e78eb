"""Weights as oneDNN's integer convolution reads them, written by compiled loops of this package.

oneDNN prepacks a weight by a generic loop, at about 0.3 GB/s, which took a third of a call of Stable Diffusion's UNet
with packed weights. The layout that it chooses for convolutions without groups is a simple one ([blocks of outputs,
taps, inputs / 4, outputs of a block, 4], without AVX-512 [blocks of 8 outputs, inputs / 8, taps, 2, 8, 4], then the
sums that a zero point needs), so a tensor of the layout that there is already, or a copy of it, is written over.
oneDNN does not promise the layout: that a tensor has this one is checked, byte by byte, when the first of its shape is
made, and where it has not, oneDNN prepacks every weight.

The size of a block depends on the shape, the processor and the number of threads. Layouts are therefore remembered for
the settings under which they were found, and before anything is written over, the tensor's own descriptor is compared
with the one that was checked. A tensor that was prepacked under other settings stays right, since oneDNN reorders what
it does not want, but only by its generic loop: `is_current` tells when it is better to prepack the codes again.
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


@dataclass(frozen=True)
class _Blocks:
    """Blocks of a layout: the outputs of one, and the groups of four inputs before the next tap, None for all."""

    outputs: int
    fours: int | None = None

    def group(self, inputs: int) -> int:
        """Return the number of groups of four inputs that lie side by side."""
        return self.fours or -(-inputs // 4)


# Blocks of oneDNN's layouts; its choice depends on the shape, the processor and the number of threads.
_BLOCKS = (*map(_Blocks, (64, 48, 32, 16)), _Blocks(8, 2))

# Bytes of oneDNN's struct at which four bytes of padding follow a number of 32 bits (ndims, data_type, format_kind,
# inner_nblks in memory_desc.hpp); nobody initialises them, so that they differ between tensors of one layout.
_PADDING = (4, 108, 316, 420)

# Number of random codes of a probe, which repeats them: a prime number, which no layout's strides share.
_PERIOD = 65521


@dataclass(frozen=True)
class _Layout:
    """The descriptor that oneDNN gives a shape, and its blocks, None for any other layout."""

    descriptor: bytes
    blocks: _Blocks | None


# Layouts of weights by settings, shape and geometry.
_layouts: dict[Any, _Layout] = {}
# One tensor of each layout that this thread's next call overwrites, and one that a model keeps.
_scratch = threading.local()
_kept: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()
# Settings under which the tensors that models keep were prepacked.
_settings_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def prepack(plain: Tensor, scale: Tensor, geometry: Sequence[Any]) -> Tensor:
    """Prepack codes into an opaque layout of oneDNN, in a tensor of the caller's own.

    Args:
        plain: int8 [out, in / groups, kernel height, kernel width].
        scale: fp32 [out].
        geometry: stride, padding, dilation and groups of the convolution.
    """
    settings = current_settings()
    key = _key(settings, plain, geometry)
    alike = _kept.get(key)
    tensor = _prepack_into(None if alike is None else alike.clone(), key, plain, scale, geometry)
    _kept[key] = tensor
    _settings_of[tensor] = settings
    return tensor


def prepack_in_place(plain: Tensor, scale: Tensor, geometry: Sequence[Any]) -> Tensor:
    """Prepack as `prepack`, where possible into a tensor that the next such call on this thread overwrites.

    Only for use within one operator; see `decode.decode_to_scratch`.
    """
    settings = current_settings()
    if getattr(_scratch, "settings", None) != settings:  # Tensors of other settings would only take memory.
        _scratch.settings, _scratch.tensors = settings, {}
    tensors: dict[Any, Tensor] = _scratch.tensors
    key = _key(settings, plain, geometry)
    with torch.inference_mode(False):  # The tensor outlives an inference mode that this call may be under.
        tensor = _prepack_into(tensors.get(key), key, plain, scale, geometry)
    if key in _layouts and _layouts[key].blocks is not None:
        tensors[key] = tensor
    return tensor


def prepack_by_onednn(plain: Tensor, scale: Tensor, geometry: Sequence[Any]) -> Tensor:
    """Prepack as `prepack` by oneDNN alone."""
    # A zero point that is not zero selects the layout that serves one.
    prepacked: Tensor = torch.ops.onednn.qconv_prepack(plain, scale, 1.0, 1, *geometry, None)
    return prepacked


def is_current(tensor: Tensor) -> bool:
    """Return whether a tensor of `prepack` has the layout of the settings that hold now."""
    settings: tuple[Any, ...] | None = _settings_of.get(tensor)
    return settings == current_settings()


def current_settings() -> tuple[Any, ...]:
    """Return what oneDNN's choice depends on, beside the convolution and the processor, on this thread now."""
    return (
        torch.get_num_threads(),
        torch.backends.mkldnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )


def _key(settings: tuple[Any, ...], plain: Tensor, geometry: Sequence[Any]) -> Any:
    parts = (tuple(part) if isinstance(part, Sequence) else part for part in geometry)
    return (settings, tuple(plain.shape), *parts)


def _prepack_into(tensor: Tensor | None, key: Any, plain: Tensor, scale: Tensor, geometry: Sequence[Any]) -> Tensor:
    """Prepack codes into `tensor`, where it has the layout that is known for `key`; else into a new one."""
    native = native_library()
    if native is None:
        return prepack_by_onednn(plain, scale, geometry)
    if key not in _layouts:
        probe = _probe(plain.shape)
        tensor = prepack_by_onednn(probe, scale, geometry)
        fitting = (blocks for blocks in _BLOCKS if _has_blocks(native, tensor, probe, blocks))
        _layouts[key] = _Layout(_descriptor(tensor), next(fitting, None))
    layout = _layouts[key]
    if tensor is None or layout.blocks is None or not _has_layout(tensor, plain.shape, layout):
        return prepack_by_onednn(plain, scale, geometry)
    _write(native, plain, torch.ops.mkldnn.data_ptr(tensor), layout.blocks)
    return tensor


def _has_layout(tensor: Tensor, shape: torch.Size, layout: _Layout) -> bool:
    """Return whether a loop that writes weights of `shape` in `layout` stays within `tensor` and fills it rightly."""
    assert layout.blocks is not None
    fits = torch.ops.mkldnn._nbytes(tensor) == _size(shape, layout.blocks)
    return fits and _descriptor(tensor) == layout.descriptor


def _descriptor(tensor: Tensor) -> bytes:
    """Return oneDNN's own description of a tensor: dtype, sizes, strides, blocks, and the sums after them."""
    serialized: Tensor = torch.ops.mkldnn._get_mkldnn_serialized_md(tensor)
    descriptor = bytearray(serialized.numpy().tobytes())
    for start in _PADDING:
        descriptor[start : start + 4] = bytes(4)
    return bytes(descriptor)


def _probe(shape: torch.Size) -> Tensor:
    """Return codes that fit one layout alone, as zeros do not."""
    generator = torch.Generator("cpu").manual_seed(0)  # torch's default device may be another one.
    codes = torch.randint(-127, 128, (_PERIOD,), dtype=torch.int8, generator=generator, device="cpu")
    return codes.repeat(-(-shape.numel() // _PERIOD))[: shape.numel()].view(shape)


def _has_blocks(native: NativeLibrary, tensor: Tensor, plain: Tensor, blocks: _Blocks) -> bool:
    size = _size(plain.shape, blocks)
    if torch.ops.mkldnn._nbytes(tensor) != size:
        return False
    expected = torch.zeros(size, dtype=torch.int8, device="cpu")
    _write(native, plain, expected.data_ptr(), blocks)
    found = (ctypes.c_int8 * size).from_address(torch.ops.mkldnn.data_ptr(tensor))
    return torch.equal(torch.frombuffer(found, dtype=torch.int8), expected)


def _size(shape: torch.Size, blocks: _Blocks) -> int:
    """Return the bytes of a weight of `shape` in blocks, with the sums after them."""
    outputs, inputs, *kernel = shape
    side_by_side = 4 * blocks.group(inputs)
    rows = -(-outputs // blocks.outputs) * blocks.outputs
    columns = -(-inputs // side_by_side) * side_by_side * torch.Size(kernel).numel()
    return rows * (columns + 4)


def _write(native: NativeLibrary, plain: Tensor, address: int, blocks: _Blocks) -> None:
    outputs, inputs, *kernel = plain.shape
    taps = torch.Size(kernel).numel()
    arguments = BlockArguments(
        plain=plain.data_ptr(),
        blocked=address,
        outputs=outputs,
        inputs=inputs,
        taps=taps,
        block=blocks.outputs,
        group=blocks.group(inputs),
    )
    native.block_weight(-(-outputs // blocks.outputs), blocks.outputs * inputs * taps, arguments)
