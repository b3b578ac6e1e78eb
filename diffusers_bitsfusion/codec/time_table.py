"""Time features over all training timesteps as small integers: coded in the file (docs/FORMAT.md), packed in memory.

Features are smooth along time: third differences of their codes are near zero and entropy-code well. In memory any row
must be read alone, on any device: there three rows take 24 bits, 10 for the first code, 8 and 6 for what the others
differ by from where the codes around them lead.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..utils.reinterpret import reinterpret
from .entropy import compress, decompress

# Relative RMS error of the codes: a uniform quantizer of step s has an RMS error of s / sqrt(12).
RELATIVE_ERROR = 0.0044

_DIFFERENCES = 3

# Rows that are packed together, and the largest code of the first of them, which is known in ten bits.
_GROUP = 3
_LARGEST = 511


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


def packed_rows(timesteps: int) -> int:
    """Return the rows of a packed table of so many rows: whole groups, one of them after the last row."""
    return _GROUP * (math.ceil((timesteps - 1) / _GROUP) + 1)


def pack_table(codes: Tensor) -> Tensor:
    """Pack codes into 8 bits each, where they are smooth enough for that.

    Of three rows the first byte is the low one of the first code, the second byte that of the second code, and the
    third byte has six bits of the third code and the two high ones of the first.

    Args:
        codes: int16 [timesteps, features].

    Returns:
        uint8 [packed_rows(timesteps), features]. Where that would not give back the codes, the codes themselves.
    """
    timesteps, features = codes.shape
    packed = torch.zeros(packed_rows(timesteps), features, dtype=torch.uint8, device=codes.device)
    rows = torch.arange(timesteps, device=codes.device)
    for part in _column_parts(features, width=128):  # The intermediates of a part stay within the caches.
        exact = codes[:, part].to(torch.int32)
        groups = _with_group_after(exact).view(-1, _GROUP, exact.shape[1])
        first, second, third = groups.unbind(dim=1)
        into = packed.view(-1, _GROUP, features)
        into[:, 0, part], into[:, 1, part] = first & 255, second & 255
        into[:, 2, part] = (third & 63) << 2 | (first >> 8 & 3)
        if not torch.equal(unpack_rows(packed[:, part], rows), exact):
            return codes
    return packed


def table_bytes(packed: Tensor) -> Tensor:
    """Return what `pack_table` gives as bytes: 16-bit codes [timesteps, features] as [timesteps, 2 * features].

    Neither gloo nor NCCL passes 16-bit integers between processes, as data parallel training does with all parameters.
    """
    return packed.contiguous().view(torch.uint8)


def from_table_bytes(table: Tensor, features: int) -> Tensor:
    """Return what `table_bytes` made bytes of, in the same memory."""
    return table if table.shape[1] == features else reinterpret(table, torch.int16)


def _with_group_after(codes: Tensor) -> Tensor:
    """Return the rows with as many after them as fill the groups: the first one goes on as the last rows went."""
    timesteps, features = codes.shape
    filled = codes.new_zeros(packed_rows(timesteps), features)
    filled[:timesteps] = codes
    after = len(filled) - _GROUP
    if after >= timesteps:  # The steps of the last group's slope are the last step of the table.
        going_on = codes[after - _GROUP] + _GROUP * (codes[-1] - codes[-2])
        filled[after] = going_on.clamp(-_LARGEST - 1, _LARGEST)
    return filled


def unpack_rows(packed: Tensor, rows: Tensor) -> Tensor:
    """Return rows of what `pack_table` packed.

    The second code of three is the one of its low byte that is nearest to the line from the first code to that of the
    next three; the third is the one of its six bits that is nearest to where that line's slope leads from the second.

    Args:
        packed: uint8 or int16 [..., features].
        rows: int64 [...], each a row of the codes.

    Returns:
        The codes, int32 [..., features].
    """
    if packed.dtype == torch.int16:
        return packed[rows].to(torch.int32)
    group = rows.div(_GROUP, rounding_mode="floor")
    first = group * _GROUP
    after = (first + _GROUP).clamp(max=packed.shape[0] - _GROUP)

    def known(row: Tensor) -> Tensor:
        code = packed[row].to(torch.int32) | (packed[row + 2].to(torch.int32) & 3) << 8
        return (code ^ (_LARGEST + 1)) - (_LARGEST + 1)

    start = known(first)
    slope = (known(after) - start).div(_GROUP, rounding_mode="floor")
    second = _nearest(packed[first + 1].to(torch.int32), start + slope, 256)
    third = _nearest(packed[first + 2].to(torch.int32) >> 2, second + slope, 64)
    step = (rows - first).unsqueeze(-1)
    return torch.where(step == 0, start, torch.where(step == 1, second, third)).to(torch.int32)


def _nearest(bits: Tensor, expected: Tensor, values: int) -> Tensor:
    """Return the integers of such low bits that are nearest to `expected`."""
    return expected + ((bits - expected + values // 2) & (values - 1)) - values // 2


def _column_parts(columns: int, width: int = 1024) -> list[slice]:
    """Return the columns in parts that keep the int32 intermediates small."""
    return [slice(start, start + width) for start in range(0, columns, width)]
