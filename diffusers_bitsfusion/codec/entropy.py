"""One zstd frame a tensor: the entropy coding of the file (docs/FORMAT.md)."""

from __future__ import annotations

import numpy as np
import torch
import zstandard
from torch import Tensor

# zstd's level, length of the shortest repeat in bytes, and size of its table of repeats as a power of two. Digits have
# unequal frequencies, for the Huffman stage, and no repeats worth finding. So this is the fastest level, kept from
# finding many: short repeats by chance, frequent where most digits are zero, take more bytes than their digits do
# (9 levels at 1.8 bits a weight: 8 % more; the table of time features: 10 %).
_LEVEL, _LEAST_MATCH, _TABLE = 1, 7, 6


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
