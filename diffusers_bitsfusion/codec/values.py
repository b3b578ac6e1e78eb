"""Values that no packed checkpoint has: scales that are not positive, biases and norms that are not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..utils.errors import DamagedFileError
from ..utils.safetensors_files import read_header
from .grid import half_range
from .schema import CheckpointSchema

# Bounds of scales: weights of 1e-30 to 1e30 have scales within them, beyond them products leave fp32.
SMALLEST_SCALE = 2.0**-120
LARGEST_WEIGHT = 2.0**120

# The same of time features, whose codes have 16 bits, and of the functions of time that they are sums of.
_LARGEST_TIME_SCALE = dict.fromkeys(("scale", "embedding_scale"), LARGEST_WEIGHT / 2**15) | {"basis_scale": 2.0**20}

_CHECKED = ("F16", "BF16", "F32", "F64", "I16", "I32")


def check_values(tensors: Mapping[str, Tensor], schema: CheckpointSchema) -> None:
    """Refuse tensors of a packed model, or of a part of it, whose values cannot be.

    Raises:
        DamagedFileError: a scale is not finite and positive, or another floating tensor is not finite; the message
            names it.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            continue
        if tensor.is_floating_point():
            if tensor.element_size() > 1 and not torch.isfinite(tensor).all():
                raise DamagedFileError(name, "holds NaN or infinite values")
        else:
            _check_integers(name, tensor, schema)


def check_file_values(files: Sequence[Path], schema: CheckpointSchema) -> None:
    """Check as `check_values`, for files, a tensor at a time.

    Raises:
        DamagedFileError: see `check_values`; or a file's header is damaged.
    """
    for file in files:
        entries = read_header(file).tensors
        with safe_open(file, framework="pt") as stream:
            for name, entry in entries.items():
                if entry.dtype in _CHECKED:
                    check_values({name: stream.get_tensor(name)}, schema)


def _check_integers(name: str, tensor: Tensor, schema: CheckpointSchema) -> None:
    """Check scales, time features and timesteps, which are the bits of floating numbers."""
    owner, _, kind = name.rpartition(".")
    layer = schema.layers.get(owner)
    if kind == "scale" and layer is not None and tensor.element_size() == layer.scale_bytes:
        scale = tensor.contiguous().view(torch.float32 if layer.scale_bytes == 4 else torch.bfloat16).float()
        largest = LARGEST_WEIGHT / half_range(layer.bits)
        if not ((scale >= SMALLEST_SCALE) & (scale <= largest)).all():
            raise DamagedFileError(name, "holds scales that are not positive, or far outside of what weights have")
    elif owner == "time_proj" and kind in _LARGEST_TIME_SCALE and tensor.dtype == torch.int32:
        scale = tensor.contiguous().view(torch.float32)
        if not ((scale > 0) & (scale <= _LARGEST_TIME_SCALE[kind])).all():
            raise DamagedFileError(name, "holds scales that are not positive, or far outside of what features have")
    elif owner == "time_proj" and kind == "values" and tensor.dtype == torch.int16:
        if not torch.isfinite(tensor.contiguous().view(torch.float16)).all():
            raise DamagedFileError(name, "holds NaN or infinite features")
    elif owner == "time_proj" and kind == "timesteps" and tensor.dtype == torch.int32:
        expected = torch.tensor(schema.time_features.timesteps, dtype=torch.float32)
        if not torch.equal(tensor.cpu().contiguous().view(torch.float32), expected):
            raise DamagedFileError(name, "holds other timesteps than config.json")
