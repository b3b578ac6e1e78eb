"""A checksum of every tensor of a file, in the metadata of its safetensors header (docs/FORMAT.md).

Readers that do not know of it ignore the metadata. A tensor's checksum covers its bytes, dtype and shape, and of codes
also what config.json says of their layer: they cannot be taken for those of another number of bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from ..utils.crc32 import crc32
from ..utils.errors import DamagedFileError, shown
from ..utils.json_files import MAX_MODEL_BYTES, parse_json
from ..utils.safetensors_files import SafetensorsHeader, TensorEntry, read_header, read_tensor_bytes
from .schema import CheckpointSchema

METADATA_KEY = "bitsfusion_checksums"
ALGORITHM = "crc32"

# Bytes that are read at a time, which stay in a processor's cache until they are counted.
_PIECE = 1 << 18

# Dtypes of tensors in a packed model's file, safetensors' names by torch's.
_DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}

_verify: ContextVar[bool] = ContextVar("verify", default=True)


@contextmanager
def loading(*, verify: bool = True) -> Iterator[None]:
    """Let `from_pretrained` compare every tensor of a packed model with its checksum, or not, within this context.

    Args:
        verify: what to do; outside of any such block tensors are compared.

    Example:
        ```python
        with loading(verify=False):
            pipe = StableDiffusionPipeline.from_pretrained(folder)
        ```
    """
    token = _verify.set(verify)
    try:
        yield
    finally:
        _verify.reset(token)


def checksums_metadata(tensors: Mapping[str, Tensor], schema: CheckpointSchema) -> dict[str, str]:
    """Return the metadata that a file with these tensors gets.

    Args:
        tensors: of the file, by name; those of all shards.
        schema: what config.json says of them.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        checksums = pool.map(lambda name: _of_tensor(name, tensors[name], schema), tensors)
    table = {"algorithm": ALGORITHM, "tensors": dict(sorted(zip(tensors, checksums, strict=True)))}
    return {METADATA_KEY: json.dumps(table, separators=(",", ":"))}


def verify_files(files: Sequence[Path], schema: CheckpointSchema) -> bool:
    """Compare every tensor of a model's files with its checksum; of files that nobody wants verified, none.

    Args:
        files: safetensors files, all of the model.
        schema: what config.json says of them.

    Returns:
        Whether they were compared. Files written before there were checksums have none.

    Raises:
        DamagedFileError: a tensor is not what was saved, is missing or is of another save, the message names it; or
            the files are not all in one folder.
    """
    if len({file.parent for file in files}) > 1:
        raise DamagedFileError(files[0].parent, "has an index that names files of other folders")
    if not _verify.get():
        return False
    headers = {file: read_header(file) for file in files}
    expected = _common_table(headers)
    if expected is None:
        return False
    found: dict[str, str] = {}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = [(file, part) for file, header in headers.items() for part in _parts(header)]
        for checksums in pool.map(lambda part: _of_entries(part[0], part[1], schema), parts):
            found |= checksums
    for file, header in headers.items():
        for name in sorted(header.tensors):
            if expected.get(name) != found[name]:
                raise DamagedFileError(
                    f"{shown(name)[1:-1]} in {file}",
                    "is damaged: its checksum fits neither its data nor what config.json says of it",
                )
    values = set(found.values())
    for name in expected.keys() - found.keys():
        if expected[name] not in values:  # Only one of tied tensors is in the file.
            raise DamagedFileError(files[0], f"lacks {shown(name)[1:-1]}, which was saved with the others")
    return True


def _common_table(headers: Mapping[Path, SafetensorsHeader]) -> dict[str, str] | None:
    """Return checksums by name, which the files of a save have in common; None where no file has any."""
    texts = {header.metadata[METADATA_KEY] for header in headers.values() if METADATA_KEY in header.metadata}
    first = next(iter(headers))
    if len(texts) > 1:
        raise DamagedFileError(
            first.parent, f"holds weight files of several saves: {', '.join(f.name for f in headers)}"
        )
    if not texts:
        return None
    where = f"{first}, its {METADATA_KEY},"
    table = parse_json(texts.pop().encode(), where, max_bytes=MAX_MODEL_BYTES)
    if table.get("algorithm") != ALGORITHM:
        return None
    tensors = table.get("tensors")
    if not isinstance(tensors, dict) or not all(isinstance(value, str) for value in tensors.values()):
        raise DamagedFileError(where, "must be an object of checksums")
    return tensors


def _of_tensor(name: str, tensor: Tensor, schema: CheckpointSchema) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    seed = _seed(name, _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), schema)
    return f"{crc32(data, seed):08x}"


def _parts(header: SafetensorsHeader) -> Iterator[dict[str, TensorEntry]]:
    """Return the tensors of a file in as many parts as there are threads, each of neighbours."""
    names = list(header.tensors)
    size = -(-len(names) // torch.get_num_threads()) or 1
    for start in range(0, len(names), size):
        yield {name: header.tensors[name] for name in names[start : start + size]}


def _of_entries(file: Path, entries: Mapping[str, TensorEntry], schema: CheckpointSchema) -> dict[str, str]:
    checksums, buffer = {}, bytearray(_PIECE)
    with file.open("rb", buffering=0) as stream:
        for name, entry in entries.items():
            checksum = _seed(name, entry.dtype, entry.shape, schema)
            for piece in read_tensor_bytes(stream, entry, buffer):
                checksum = crc32(piece, checksum)
            checksums[name] = f"{checksum:08x}"
    return checksums


def _seed(name: str, dtype: str, shape: tuple[int, ...], schema: CheckpointSchema) -> int:
    """Return the checksum of what a tensor's bytes mean."""
    meaning: list[object] = [dtype, list(shape)]
    owner, _, kind = name.rpartition(".")
    if kind == "codes" and owner in schema.layers:
        layer = schema.layers[owner]
        meaning += [layer.bits, list(layer.shape), schema.compression]
    elif owner == "time_proj":
        meaning.append(schema.time_features.meaning())
    seed: int = crc32(json.dumps(meaning).encode())
    return seed
