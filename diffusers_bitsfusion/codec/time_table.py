"""Time features over all training timesteps as small integers, and their coding in the file (docs/FORMAT.md).

Features are smooth along time: third differences of their codes are near zero and entropy-code well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .entropy import compress, decompress

# Relative RMS error of the codes: a uniform quantizer of step s has an RMS error of s / sqrt(12).
_RELATIVE_ERROR = 0.0044

_DIFFERENCES = 3


def quantize_table(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a table of features, one scale a feature.

    Args:
        features: fp32 [timesteps, features].

    Returns:
        codes int16 [timesteps, features], scale fp32 [features]. |code| stays below 66 * sqrt(timesteps), so that
        int16 holds the codes and their third differences of up to 3,800 timesteps.
    """
    rms = features.square().mean(dim=0).sqrt()
    scale = torch.where(rms > 0, rms * (_RELATIVE_ERROR * math.sqrt(12.0)), 1.0)
    return torch.round(features / scale).to(torch.int16), scale


def encode_table(codes: Tensor) -> Tensor:
    """Encode codes int16 [timesteps, features] as one zstd frame, uint8 [frame bytes].

    Third differences along time (the rows before the first are zero), zigzag (0, -1, 1, -2, ... to 0, 1, 2, 3, ...),
    then all low bytes followed by all high bytes.
    """
    planes = torch.empty(2, *codes.shape, dtype=torch.uint8, device=codes.device)
    for part in _column_parts(codes.shape[1]):
        difference = codes[:, part].to(torch.int32)
        for _ in range(_DIFFERENCES):
            difference = torch.diff(difference, dim=0, prepend=torch.zeros_like(difference[:1]))
        zigzag = (difference << 1) ^ (difference >> 31)
        planes[0, :, part], planes[1, :, part] = zigzag & 255, zigzag >> 8
    return compress(planes)


def decode_table(frame: Tensor, timesteps: int, features: int) -> Tensor:
    """Decode a frame of `encode_table`: int16 [timesteps, features].

    Raises:
        ValueError: the frame is damaged or holds a table of another size.
    """
    low, high = decompress(frame, 2 * timesteps * features).view(2, timesteps, features)
    codes = torch.empty(timesteps, features, dtype=torch.int16, device=low.device)
    first, second, third = torch.zeros(_DIFFERENCES, features, dtype=torch.int16, device=low.device)
    for t in range(timesteps):
        zigzag = (high[t].to(torch.int16) << 8) | low[t]
        difference = ((zigzag >> 1) & 0x7FFF) ^ -(zigzag & 1)
        codes[t] = third.add_(second.add_(first.add_(difference)))  # sums wrap around, as the differences do
    return codes


def _column_parts(columns: int) -> list[slice]:
    """Return the columns in parts that keep the int32 intermediates small."""
    return [slice(start, start + 1024) for start in range(0, columns, 1024)]
