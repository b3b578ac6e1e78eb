"""One zstd frame a tensor: the entropy coding of the file (docs/FORMAT.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import zstandard
from torch import Tensor

# zstd's level, length of the shortest repeat in bytes, and size of its table of repeats as a power of two. Digits have
# unequal frequencies, for the Huffman stage, and no repeats worth finding. So this is the fastest level, kept from
# finding many: short repeats by chance, frequent where most digits are zero, take more bytes than their digits do
# (9 levels at 1.8 bits a weight: 8 % more; the table of time features: 10 %).
_LEVEL, _LEAST_MATCH, _TABLE = 1, 7, 6

# Blocks that are decompressed at a time while a frame is checked, of at most 128 kB each.
_BLOCKS = 16
# Type of the blocks that repeat one byte; bytes of the checksum that ends a frame.
_REPEATED, _CHECKSUM = 1, 4


def compress(data: Tensor) -> Tensor:
    """Compress a uint8 tensor of any shape to a zstd frame, uint8 [frame bytes]."""
    array = np.ascontiguousarray(data.cpu().numpy())
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, min_match=_LEAST_MATCH, hash_log=_TABLE, write_checksum=True, write_content_size=True
    )
    frame = zstandard.ZstdCompressor(compression_params=parameters).compress(array.data)
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def decompress(frame: Tensor, size: int) -> Tensor:
    """Decompress a frame of `compress` that must hold exactly `size` bytes; uint8 [size].

    Raises:
        ValueError: the frame is damaged, cut short, without its checksum, or of another size. The claimed size is
            checked before anything is allocated.
    """
    data = frame.numpy().data
    with _naming_damage():
        _check_header(data, size)
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def check_frame(frame: Tensor, size: int, largest: int = 255) -> None:
    """Check a frame as `decompress` does, and that no byte is above `largest`, in a constant amount of memory.

    Raises:
        ValueError: see `decompress`; or a byte is larger.
    """
    data = frame.numpy().data
    with _naming_damage():
        _check_header(data, size)
        stream = zstandard.ZstdDecompressor().decompressobj()
        for piece in _pieces(data):
            raw = stream.decompress(piece)
            if raw and np.frombuffer(raw, np.uint8).max() > largest:
                raise ValueError("is damaged: it holds bytes that its codes never have")
        if not stream.eof:
            raise ValueError("is damaged or cut short")


def _pieces(data: memoryview) -> Iterator[memoryview]:
    """Yield a frame in pieces of a few blocks, of bounded content however well they compress (RFC 8878, 3.1.1)."""
    start, place, last = 0, zstandard.frame_header_size(data), False
    while not last:
        for _ in range(_BLOCKS):
            header = int.from_bytes(data[place : place + 3], "little")
            last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
            place += 3 + (1 if kind == _REPEATED else length)
            if place + _CHECKSUM > len(data):
                raise ValueError("is damaged or cut short")
            if last:
                place += _CHECKSUM
                break
        yield data[start:place]
        start = place
    if place != len(data):
        raise ValueError("is damaged: bytes follow its zstd frame")


def _check_header(data: memoryview, size: int) -> None:
    claimed = zstandard.frame_content_size(data)
    if claimed != size:
        raise ValueError(f"holds {claimed} bytes where {size} are expected")
    if not zstandard.get_frame_parameters(data).has_checksum:
        raise ValueError("is damaged: it is a zstd frame without the checksum that every one of the format has")


@contextmanager
def _naming_damage() -> Iterator[None]:
    try:
        yield
    except zstandard.ZstdError as error:
        raise ValueError(f"is damaged or cut short ({error})") from error
