"""Reader of the headers of safetensors files, which checks every number before anything is allocated."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from .errors import DamagedFileError, shown
from .json_files import MAX_MODEL_BYTES, is_count, is_list_of, parse_json

# Bits of an element, by the name of its dtype in the file (the safetensors format).
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}

# Bytes of the length at the beginning of a file.
_LENGTH_BYTES = 8

# Dimensions of the tensor with the most of them, far above those of any layer; they bound products of sizes.
MAX_DIMENSIONS = 16

# Key of the metadata in a header.
_METADATA = "__metadata__"

# Problem by the first bytes of other files that often have the name of a safetensors file.
_IMPOSTORS = {
    b"version https://git-lfs": "is a Git-LFS pointer and not the file itself; fetch it by `git lfs pull`",
    b"<": "is a web page and not the file itself; download the file and not the page that shows it",
    b"PK": "is a zip archive (a .bin or .pt of torch) and no safetensors file",
}


@dataclass(frozen=True)
class TensorEntry:
    """Entry of a tensor in a header.

    Attributes:
        dtype: name of the dtype in the file, for example "F16".
        shape: shape of the tensor.
        start: offset of the first byte of its data from the beginning of the file.
        stop: offset after the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the data."""
        return self.stop - self.start


@dataclass(frozen=True)
class SafetensorsHeader:
    """Header of a safetensors file.

    Attributes:
        tensors: entries by name, in the order of their data.
        metadata: texts by name.
    """

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(file: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read the header of a safetensors file and compare every length with the file's own.

    Raises:
        DamagedFileError: the file is cut short or no safetensors file, or its header is damaged: an entry has an
            unknown dtype, a shape that is no list of sizes, or bytes that do not follow those of the one before.
        FileNotFoundError: there is no such file.
    """
    path = Path(file)
    size = path.stat().st_size
    with path.open("rb") as stream:
        beginning = stream.read(32)
        for mark, problem in _IMPOSTORS.items():
            if beginning.lstrip().startswith(mark):
                _refuse(path, problem)
        length = int.from_bytes(beginning[:_LENGTH_BYTES], "little")
        if size < _LENGTH_BYTES or length > min(MAX_MODEL_BYTES, size - _LENGTH_BYTES):
            _refuse(path, f"is no safetensors file, or cut short: a header of {length} bytes in a file of {size}")
        stream.seek(_LENGTH_BYTES)
        header = parse_json(stream.read(length), f"{path}, its header,", max_bytes=MAX_MODEL_BYTES)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not is_list_of(list(metadata.values()), str):
        _refuse(path, f"is damaged: {_METADATA} must be an object of texts")
    entries = [(name, _entry(path, name, content, _LENGTH_BYTES + length)) for name, content in header.items()]
    entries.sort(key=lambda entry: (entry[1].start, entry[1].stop))
    reached = _LENGTH_BYTES + length
    for name, entry in entries:
        if entry.start != reached:
            _refuse(path, f"is damaged: the data of {shown(name)} do not follow those of the tensor before")
        reached = entry.stop
    if reached != size:
        _refuse(path, f"is cut short or too long: it has {size} bytes where {reached} are expected")
    return SafetensorsHeader(dict(entries), metadata)


def sort_metadata(file: Path) -> None:
    """Sort the metadata of a file by name, in place: the safetensors library writes them in any order."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        header = json.loads(stream.read(length))
        if _METADATA in header:
            header[_METADATA] = dict(sorted(header[_METADATA].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) <= length:
                stream.seek(_LENGTH_BYTES)
                stream.write(text.ljust(length))


def read_tensor_bytes(stream: BinaryIO, entry: TensorEntry, buffer: bytearray) -> Iterator[memoryview]:
    """Yield the data of one tensor of an open file in pieces, each in the same memory, which the next one overwrites.

    Args:
        stream: file, open for reading bytes.
        entry: entry of the tensor in the header of the file.
        buffer: memory for a piece: new memory for each would take longer than reading.

    Raises:
        DamagedFileError: the file has become shorter.
    """
    stream.seek(entry.start)
    view, left = memoryview(buffer), entry.num_bytes
    while left:
        count = stream.readinto(view[: min(len(buffer), left)])  # type: ignore[attr-defined]
        if not count:
            _refuse(stream.name, "is cut short")
        left -= count
        yield view[:count]


def _entry(path: Path, name: str, content: Any, data_start: int) -> TensorEntry:
    if not isinstance(content, dict) or content.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"is damaged: its entry of {shown(name)} must have dtype, shape and data_offsets")
    dtype, shape, offsets = content["dtype"], content["shape"], content["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _refuse(path, f"has the dtype {shown(dtype)} at {shown(name)}, which is none of {', '.join(DTYPE_BITS)}")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(is_count(size) for size in value):
            _refuse(path, f"is damaged: {key} of {shown(name)} must list counts, not {shown(value)}")
    if len(shape) > MAX_DIMENSIONS:
        _refuse(path, f"is damaged: {shown(name)} has {len(shape)} dimensions")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if len(offsets) != 2 or 8 * (offsets[1] - offsets[0]) != bits:
        _refuse(
            path,
            f"is damaged: {shown(name)} of {dtype} and shape {shown(shape)} does not take the bytes {shown(offsets)}",
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _refuse(path: object, problem: str) -> NoReturn:
    raise DamagedFileError(path, problem)
