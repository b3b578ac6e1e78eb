"""One zstd frame a tensor: the entropy coding of the file (docs/FORMAT.md)."""

from __future__ import annotations

import numpy as np
import torch
import zstandard
from torch import Tensor

# Digits have no repeats worth finding, only unequal frequencies: the fastest level's Huffman stage does all there is.
_LEVEL = 1


def compress(data: Tensor) -> Tensor:
    """uint8 tensor of any shape to a zstd frame, uint8 [frame bytes]."""
    array = np.ascontiguousarray(data.cpu().numpy())
    frame = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(array.data)
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def decompress(frame: Tensor, size: int) -> Tensor:
    """Inverse of `compress` for a frame that must hold exactly `size` bytes; uint8 [size].

    Raises:
        ValueError: the frame is damaged, cut short, without its checksum, or of another size. The claimed size is
            checked before anything is allocated.
    """
    data = frame.numpy().data
    try:
        claimed = zstandard.frame_content_size(data)
        if claimed != size:
            raise ValueError(f"holds {claimed} bytes where {size} are expected")
        if not zstandard.get_frame_parameters(data).has_checksum:
            raise ValueError("is damaged: it is a zstd frame without the checksum that every one of the format has")
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"is damaged or cut short ({error})") from error
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
