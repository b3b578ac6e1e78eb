"""Names of the weight files that diffusers writes into a model folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import DamagedFileError, shown
from ..utils.json_files import MAX_MODEL_BYTES, read_json
from ..utils.safetensors_files import SafetensorsHeader, read_header

_SHARD = re.compile(r"(?P<stem>.+?)-\d{5}-of-\d{5}(?P<end>\.(safetensors|bin))")
_ENDS = (".safetensors", ".bin")
# Stems of the names of weight files, of diffusers' models and of transformers'.
_STEMS = ("diffusion_pytorch_model", "model")


def stem(name: str) -> str | None:
    """Return "diffusion_pytorch_model" (".fp16" with a variant) of a weight file, shard or index; None of others."""
    if name.endswith(".index.json"):
        name = name.removesuffix(".index.json")
    shard = _SHARD.fullmatch(name)
    if shard:
        return shard["stem"]
    return next((name.removesuffix(end) for end in _ENDS if name.endswith(end)), None)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of the model in `folder`, all shards; of several variants, the plain one's.

    Raises:
        FileNotFoundError: there is none.
    """
    files = [file for file in sorted(folder.glob("*.safetensors")) if _is_of_a_model(str(stem(file.name)))]
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file of a model ({', '.join(_STEMS)}).")
    first = min((str(stem(file.name)) for file in files), key=len)
    return [file for file in files if stem(file.name) == first]


def packed_files(files: Sequence[str | os.PathLike[str]] | None) -> list[Path]:
    """Return the files of a packed model that another library is about to load; none where it has only tensors.

    Raises:
        DamagedFileError: one is no safetensors file; packed models are saved in no other.
    """
    paths = [Path(file) for file in files or []]
    for path in paths:
        if path.suffix != ".safetensors":
            raise DamagedFileError(path, "is no safetensors file, the only kind that packed models are saved in")
    return paths


def index_files(folder: Path) -> list[Path]:
    """Return the index of the model in `folder`, where it is sharded; as a list, which is empty where it is not.

    Raises:
        FileNotFoundError: there is no weight file.
    """
    first = stem(weight_files(folder)[0].name)
    return [file for file in sorted(folder.glob("*.index.json")) if stem(file.name) == first]


def read_headers(folder: Path) -> dict[Path, SafetensorsHeader]:
    """Read the headers of all weight files of the model in `folder`, compared with its index where it has one.

    Raises:
        FileNotFoundError: there is no weight file.
        DamagedFileError: a file is damaged, or index and files do not hold the same tensors.
    """
    headers = {file: read_header(file) for file in weight_files(folder)}
    where: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.tensors:
            if name in where:
                raise DamagedFileError(file, f"holds {name}, which {where[name]} holds as well")
            where[name] = file.name
    for index in index_files(folder):
        mapped = read_index(index)
        for name, file_name in mapped.items():
            if where.get(name) != file_name:
                raise DamagedFileError(index, f"says that {file_name} holds {shown(name)}, which it does not")
        if extra := sorted(where.keys() - mapped.keys()):
            raise DamagedFileError(index, f"does not name {extra[0]}, which {where[extra[0]]} holds")
    return headers


def read_index(file: Path) -> dict[str, str]:
    """Read names of files by names of tensors from a `*.index.json`.

    Raises:
        DamagedFileError: it has no `weight_map` or `metadata`, or names something else than a file beside it.
    """
    content = read_json(file, non_finite=True, max_bytes=MAX_MODEL_BYTES)
    mapped = content.get("weight_map")
    if not isinstance(content.get("metadata"), dict):  # Both libraries look up what it has.
        raise DamagedFileError(file, 'has no "metadata", an object')
    if not isinstance(mapped, dict) or not mapped:
        raise DamagedFileError(file, 'has no "weight_map" from tensors to files')
    for name, file_name in mapped.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name or stem(file_name) is None:
            raise DamagedFileError(file, f"says that {shown(name)} is in {shown(file_name)}, no name of a weight file")
    return mapped


def _is_of_a_model(stem: str) -> bool:
    """Return whether a file is a model's rather than an adapter's, which may lie beside it."""
    return stem.partition(".")[0] in _STEMS
