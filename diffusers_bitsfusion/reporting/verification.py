"""Everything that a packed checkpoint says of itself, compared with what it holds; no model is built."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..codec.checksums import verify_files
from ..codec.schema import CheckpointSchema
from ..codec.state_dict import check_encoded
from ..codec.values import check_file_values
from ..codec.weight_files import read_headers
from ..utils.errors import DamagedFileError, shown
from ..utils.hub import local_folder
from ..utils.json_files import read_json
from ..utils.safetensors_files import SafetensorsHeader, read_header
from .report_types import MB
from .size_report import is_packed_model, read_schema


@dataclass(frozen=True)
class Verified:
    """One model that was found to be sound.

    Attributes:
        files: weight files.
        tensors: in them.
        num_bytes: of them.
        packed: whether this package packed it; of others only the files' own structure was looked at.
        checksums: whether its tensors were compared with checksums, which files of earlier versions do not have.
    """

    files: int
    tensors: int
    num_bytes: int
    packed: bool
    checksums: bool

    def __str__(self) -> str:
        how = "every checksum fits" if self.checksums else "no checksums"
        if self.packed and not self.checksums:
            how += ": it was written before there were any; load it and save it again to add them"
        return f"{self.tensors} tensors in {self.files} files, {self.num_bytes / MB:.2f} MB, {how}"


@dataclass(frozen=True)
class Verification:
    """A folder that was found to be sound: its models by name, "" of a lone model."""

    models: Mapping[str, Verified]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe content."""
        return {name: asdict(model) for name, model in self.models.items()}

    def __str__(self) -> str:
        return "\n".join(f"{name + ': ' if name else ''}{model}" for name, model in self.models.items())


def verify_checkpoint(path: str | os.PathLike[str]) -> Verification:
    """Read all of a packed model or pipeline, and compare counts, values and checksums, without building a model.

    Args:
        path: a folder, or a Hub id, whose files are then downloaded.

    Raises:
        DamagedFileError: something is damaged; the message names the file and the tensor.
        FileNotFoundError: there is no model.
        ValueError: nothing in it is packed by this package.
    """
    folder = local_folder(path, ["*.json", "*.safetensors"])
    if (folder / "config.json").is_file():
        models = {"": _verify_model(folder)}
    elif (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json", non_finite=True)
        parts = sorted(part for part in folder.iterdir() if part.is_dir() and part.name in index)
        models = {part.name: _verify_model(part) for part in parts if (part / "config.json").is_file()}
        for file in sorted(folder.rglob("*.json")):
            read_json(file, object, non_finite=True)
    else:
        raise FileNotFoundError(f"{path} holds neither a model (config.json) nor a pipeline (model_index.json).")
    if not any(model.packed for model in models.values()):
        raise ValueError(f"Nothing in {path} is quantized by diffusers_bitsfusion.")
    return Verification(models)


def _verify_model(folder: Path) -> Verified:
    if not is_packed_model(folder):
        plain = {file: read_header(file) for file in sorted(folder.glob("*.safetensors"))}
        return _verified(plain, packed=False, checksums=False)
    schema = read_schema(folder)
    headers = read_headers(folder)
    where = {name: file for file, header in headers.items() for name in header.tensors}
    if missing := [name for name in _needed(schema) if name not in where]:
        raise DamagedFileError(folder, f"lacks {missing[0]}, of {len(missing)} tensors that are missing")
    stray = [name for name in where if name.endswith(".codes") and name not in set(_needed(schema))]
    if stray:
        raise DamagedFileError(where[stray[0]], f"holds {shown(stray[0])}, of which config.json says nothing")
    files = list(headers)
    check_file_values(files, schema)
    checksums = verify_files(files, schema)
    for file, header in headers.items():
        _check(file, header, schema)
    return _verified(headers, packed=True, checksums=checksums)


def _needed(schema: CheckpointSchema) -> Iterator[str]:
    """Return the names of the tensors that a checkpoint must have, of its packed part."""
    for name, layer in schema.layers.items():
        yield from (f"{name}.codes", f"{name}.scale")
        if layer.branch_rank:
            yield from (f"{name}.branch_down", f"{name}.branch_up")
    time = schema.time_features
    kinds = {"keep": (), "table": ("codes", "scale"), "cache": ("values", "timesteps")}
    of_sums = ("basis", "basis_scale", "coefficients", "scale")
    yield from (f"time_proj.{kind}" for kind in (of_sums if time.rank else kinds[time.kind]))
    if time.embedding_width and not time.rank:
        yield from ("time_proj.embedding_codes", "time_proj.embedding_scale")


def _check(file: Path, header: SafetensorsHeader, schema: CheckpointSchema) -> None:
    """Check what is packed, a tensor at a time; what it decompresses to is never held as a whole."""
    packed = {f"{name}.{kind}" for name in schema.layers for kind in ("codes", "scale", "branch_down", "branch_up")}
    with safe_open(file, framework="pt") as stream:
        for name in header.tensors:
            if name in packed or name.startswith("time_proj."):
                try:
                    check_encoded({name: stream.get_tensor(name)}, schema)
                except ValueError as error:
                    raise DamagedFileError(f"{file}:", str(error)) from error


def _verified(headers: Mapping[Path, SafetensorsHeader], packed: bool, checksums: bool) -> Verified:
    return Verified(
        files=len(headers),
        tensors=sum(len(header.tensors) for header in headers.values()),
        num_bytes=sum(file.stat().st_size for file in headers),
        packed=packed,
        checksums=checksums,
    )
