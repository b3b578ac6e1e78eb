"""Time features over all training timesteps as small integers: coded in the file (docs/FORMAT.md), packed in memory.

Features are smooth along time: third differences of their codes are near zero and entropy-code well. In memory any row
must be read alone, on any device: there the low byte of each code is kept, and of every third row two bits more. A
code in between is the one of its low byte that is nearest to the line between the rows around it that are known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .entropy import compress, decompress

# Relative RMS error of the codes: a uniform quantizer of step s has an RMS error of s / sqrt(12).
RELATIVE_ERROR = 0.0044

_DIFFERENCES = 3

# Distance of the rows whose codes are known in ten bits, as are those of the last row; largest of these codes.
_ANCHOR_DISTANCE = 3
_LARGEST_ANCHOR = 511


def quantize_table(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a table of features, one scale a feature.

    Args:
        features: fp32 [timesteps, features].

    Returns:
        codes int16 [timesteps, features], scale fp32 [features]. |code| stays below 66 * sqrt(timesteps), so that
        int16 holds the codes and their third differences of up to 3,800 timesteps.
    """
    rms = features.square().mean(dim=0).sqrt()
    scale = torch.where(rms > 0, rms * (RELATIVE_ERROR * math.sqrt(12.0)), 1.0)
    return torch.round(features / scale).to(torch.int16), scale


def dequantize_table(codes: Tensor, scale: Tensor) -> Tensor:
    """Return features fp32 [timesteps, features] of codes int16 [timesteps, features] and scale fp32 [features]."""
    return codes.float() * scale


def to_bytes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the low and the high bytes, uint8, of integers modulo 2^16 in zigzag: 0, -1, 1, -2 as 0, 1, 2, 3."""
    wide = codes.to(torch.int32)
    zigzag = (wide << 1) ^ (wide >> 31)
    return (zigzag & 255).to(torch.uint8), (zigzag >> 8 & 255).to(torch.uint8)


def from_bytes(low: Tensor, high: Tensor) -> Tensor:
    """Return the integers of `to_bytes`, int16."""
    zigzag = (high.to(torch.int16) << 8) | low
    return ((zigzag >> 1) & 0x7FFF) ^ -(zigzag & 1)


def encode_table(codes: Tensor) -> Tensor:
    """Encode codes int16 [timesteps, features] as one zstd frame, uint8 [frame bytes].

    Third differences along time (the rows before the first are zero), as `to_bytes` has them: all low bytes followed
    by all high bytes.
    """
    planes = torch.empty(2, *codes.shape, dtype=torch.uint8, device=codes.device)
    for part in _column_parts(codes.shape[1]):
        difference = codes[:, part].to(torch.int32)
        for _ in range(_DIFFERENCES):
            difference = torch.diff(difference, dim=0, prepend=torch.zeros_like(difference[:1]))
        planes[0, :, part], planes[1, :, part] = to_bytes(difference)
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
        difference = from_bytes(low[t], high[t])
        codes[t] = third.add_(second.add_(first.add_(difference)))  # Sums wrap around, as the differences do.
    return codes


def high_bits_rows(timesteps: int) -> int:
    """Rows of the high bits of a table of so many rows, four anchors a byte."""
    return math.ceil(_anchors(timesteps) / 4)


def pack_table(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Pack codes into 8.67 bits each, where they are smooth enough for that.

    Args:
        codes: int16 [timesteps, features].

    Returns:
        The low bytes of all codes, uint8 [timesteps, features], and the high bits of the anchors, uint8
        [high_bits_rows(timesteps), features]. Where they would not give back the codes, the codes themselves, int16,
        and zeros.
    """
    timesteps, features = codes.shape
    low = torch.empty(timesteps, features, dtype=torch.uint8, device=codes.device)
    high = torch.zeros(high_bits_rows(timesteps), features, dtype=torch.uint8, device=codes.device)
    rows = torch.arange(timesteps, device=codes.device)
    for part in _column_parts(features, width=128):  # The intermediates of a part stay within the caches.
        exact = codes[:, part].to(torch.int32)
        low[:, part] = exact & 255
        bits = torch.zeros(4 * len(high), exact.shape[1], dtype=torch.int32, device=codes.device)
        bits[: _anchors(timesteps)] = (exact[_anchor_rows(timesteps, codes.device)] >> 8) & 3
        bits = bits.view(len(high), 4, -1)
        high[:, part] = bits[:, 0] | bits[:, 1] << 2 | bits[:, 2] << 4 | bits[:, 3] << 6
        if not torch.equal(unpack_rows(low[:, part], high[:, part], rows), exact):
            return codes, torch.zeros_like(high)
    return low, high


def unpack_rows(codes: Tensor, high_bits: Tensor, rows: Tensor) -> Tensor:
    """Return rows of what `pack_table` packed.

    Args:
        codes: uint8 or int16 [timesteps, features].
        high_bits: uint8 [high_bits_rows(timesteps), features].
        rows: int64 [...], each in 0 ... timesteps - 1.

    Returns:
        The codes, int32 [..., features].
    """
    if codes.dtype == torch.int16:
        return codes[rows].to(torch.int32)
    timesteps = codes.shape[0]
    last = timesteps - 1
    anchor = rows.div(_ANCHOR_DISTANCE, rounding_mode="floor")
    before, after = anchor * _ANCHOR_DISTANCE, ((anchor + 1) * _ANCHOR_DISTANCE).clamp(max=last)

    def known(number: Tensor, row: Tensor) -> Tensor:
        bits = high_bits[number.div(4, rounding_mode="floor")].to(torch.int32) >> (2 * (number % 4)).unsqueeze(-1)
        return ((codes[row].to(torch.int32) | (bits & 3) << 8) ^ (_LARGEST_ANCHOR + 1)) - (_LARGEST_ANCHOR + 1)

    start, end = known(anchor, before), known((anchor + 1).clamp(max=_anchors(timesteps) - 1), after)
    step, distance = (rows - before).unsqueeze(-1), (after - before).clamp(min=1).unsqueeze(-1)
    line = start + ((end - start) * step).div(distance, rounding_mode="floor")
    return (line + ((codes[rows].to(torch.int32) - line + 128) & 255) - 128).to(torch.int32)


def _anchors(timesteps: int) -> int:
    return math.ceil((timesteps - 1) / _ANCHOR_DISTANCE) + 1


def _anchor_rows(timesteps: int, device: torch.device) -> Tensor:
    """Row of each anchor, the last row among them."""
    return (torch.arange(_anchors(timesteps), device=device) * _ANCHOR_DISTANCE).clamp(max=timesteps - 1)


def _column_parts(columns: int, width: int = 1024) -> list[slice]:
    """Return the columns in parts that keep the int32 intermediates small."""
    return [slice(start, start + width) for start in range(0, columns, width)]
