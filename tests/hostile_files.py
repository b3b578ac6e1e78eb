"""Hostile files of every kind that this package reads: small ones that claim, expand to or call for much memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zstandard

from diffusers_bitsfusion import BitsFusionConfig
from diffusers_bitsfusion.codec.checksums import METADATA_KEY, checksums_metadata

WEIGHTS = "diffusion_pytorch_model.safetensors"

# Function that changes a sound folder.
Change = Callable[[Path], None]

# Packed models.


def _header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Return a change of the header of the weight file, whose data stay."""

    def apply(folder: Path) -> None:
        header, data = _read_weights(folder)
        change(header)
        _write_weights(folder, header, data)

    return apply


def _read_weights(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = _weights(folder).read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write_weights(folder: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    _weights(folder).write_bytes(len(text).to_bytes(8, "little") + text + data)


def _weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def _length(value: int) -> Change:
    def apply(folder: Path) -> None:
        file = _weights(folder)
        file.write_bytes(value.to_bytes(8, "little") + file.read_bytes()[8:])

    return apply


def _claim(header: dict[str, Any]) -> None:
    _entry(header)["shape"] = [10**12]


def _many_dimensions(header: dict[str, Any]) -> None:
    _entry(header)["shape"] = [1] * 400_000


def _many_entries(header: dict[str, Any]) -> None:
    header.update({f"x{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)})


def _entry(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = header[_codes(header)]
    return entry


def _codes(header: dict[str, Any]) -> str:
    """Return the largest tensor of codes."""
    codes = [name for name in header if name.endswith(".codes")]
    return max(codes, key=lambda name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0])


def frame(make: Callable[[bytes], bytes]) -> Change:
    """Return a change of one tensor of codes by a function from its frame to another, with checksums that fit."""

    def apply(folder: Path) -> None:
        header, data = _read_weights(folder)
        metadata, chosen = header.pop("__metadata__"), _codes(header)
        tensors = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}
        tensors[chosen] = make(tensors[chosen])
        start = 0
        for name, entry in header.items():
            entry["data_offsets"] = [start, start := start + len(tensors[name])]
        header[chosen]["shape"] = [len(tensors[chosen])]
        quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
        schema = BitsFusionConfig.from_dict(quantization).schema
        table = json.loads(metadata[METADATA_KEY])
        tensor = torch.frombuffer(bytearray(tensors[chosen]), dtype=torch.uint8)
        table["tensors"] |= json.loads(checksums_metadata({chosen: tensor}, schema)[METADATA_KEY])["tensors"]
        header["__metadata__"] = metadata | {METADATA_KEY: json.dumps(table)}
        _write_weights(folder, header, b"".join(tensors[name] for name in tensors))

    return apply


def zeros(size: int, claimed: bool) -> Callable[[bytes], bytes]:
    """Return a function that makes a frame of zeros, a few kilobytes for gigabytes."""

    def make(_: bytes) -> bytes:
        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        stream = compressor.compressobj(size=size if claimed else -1)
        piece = bytes(1 << 22)
        return b"".join([*(stream.compress(piece) for _ in range(size >> 22)), stream.flush()])

    return make


def _claims_a_terabyte(content: bytes) -> bytes:
    """Return a frame whose header claims a content of 1 TB (RFC 8878, 3.1.1.1): eight bytes of size, no window."""
    size = zstandard.frame_header_size(content)
    return content[:4] + bytes([0b11100100]) + (10**12).to_bytes(8, "little") + content[size:]


def _json(change: Callable[[dict[str, Any]], object], name: str = "config.json") -> Change:
    """Return a change of a JSON file."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content["quantization_config"])
        (folder / name).write_text(json.dumps(content))

    return apply


def _text(text: bytes, name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(text)

    return apply


def _layer(content: dict[str, Any], **values: Any) -> None:
    content["layers"][next(iter(content["layers"]))].update(values)


def _time(content: dict[str, Any], **values: Any) -> None:
    content["time_embedding"].update(values)


_DEEP = b'{"a":' * 3_000_000
_EMPTY_LISTS = b"[" + b"[]," * 20_000_000 + b"[]]"
_LONG_TEXT = b'"' + b"x" * (60 << 20) + b'"'

# What every reader of headers refuses.
HEADER: dict[str, Change] = {
    "a shape of 1 TB": _header(_claim),
    "a header of 1 TB": _length(10**12),
    "400,000 dimensions": _header(_many_dimensions),
    "half of the file": lambda folder: os.truncate(_weights(folder), _weights(folder).stat().st_size // 2),
}
MODEL: dict[str, Change] = HEADER | {
    "a frame that claims 1 TB": frame(_claims_a_terabyte),
    "a frame that holds 1 GB": frame(zeros(1 << 30, True)),
    "a frame that holds 1 GB, no size": frame(zeros(1 << 30, False)),
    "a frame 100 times": frame(lambda content: content * 100),
    "a layer of 1 TB": _json(lambda content: _layer(content, shape=[10**6, 10**6])),
    "a branch of rank 65,536": _json(lambda content: _layer(content, branch_rank=1 << 16)),
}
TIME: dict[str, Change] = {
    "features of 1 TB": _json(lambda content: _time(content, features=[["x", 10**9]])),
    "3,800 timesteps": _json(lambda content: _time(content, num_timesteps=3800)),
    "an embedding of 65,536": _json(lambda content: _time(content, embedding_width=1 << 16)),
}

# What diffusers and transformers read themselves before they ask this package; `inspect --verify` reads it first.
CONFIG: dict[str, Change] = {
    "300,000 tensors more": _header(_many_entries),
    "JSON 3,000,000 deep": _text(_DEEP, "config.json"),
    "20,000,000 empty lists": _text(_EMPTY_LISTS, "config.json"),
    "a text of 60 MB": _text(_LONG_TEXT, "config.json"),
    "an index of empty lists": _text(_EMPTY_LISTS, f"{WEIGHTS}.index.json"),
}


# Files of torch.


def pickled(content: bytes, pattern: str) -> Change:
    """Return a change of a file of torch to one whose pickle is `content`, all checksums right."""

    def apply(folder: Path) -> None:
        file, result = _first(folder, pattern), io.BytesIO()
        with zipfile.ZipFile(file) as archive, zipfile.ZipFile(result, "w") as changed:
            for name in archive.namelist():
                changed.writestr(name, content if name.endswith("/data.pkl") else archive.read(name))
        file.write_bytes(result.getvalue())

    return apply


def _saved(content: Any, pattern: str) -> Change:
    return lambda folder: torch.save(content, _first(folder, pattern))


def _first(folder: Path, pattern: str) -> Path:
    """Return a file of torch; checksums of the folder's files, which earlier versions did not write, are taken out."""
    if (run := folder / "run.json").exists():
        content = json.loads(run.read_text())
        run.write_text(json.dumps({"step": content["step"], "settings": content["settings"]}))
    return min(folder.rglob(pattern))


def _call(name: str, size: int) -> bytes:
    """Return a pickle that calls `name(size)`."""
    return b"\x80\x02c" + name.encode() + b"\n" + pickle.dumps((size,), protocol=2)[2:-1] + b"R."


def _doubled(times: int) -> list[Any]:
    content: list[Any] = [torch.zeros(10)]
    for _ in range(times):
        content = [content, content]
    return content


def torch_changes(pattern: str, wrap: Callable[[torch.Tensor], Any]) -> dict[str, Change]:
    """Return changes of the file of torch that a pattern finds; `wrap` puts a tensor where its reader wants one."""
    return {
        f"{pattern}: bytearray(1 GB)": pickled(_call("__builtin__\nbytearray", 1 << 30), pattern),
        f"{pattern}: torch.Tensor(1 G)": pickled(_call("torch\nTensor", 1 << 30), pattern),
        f"{pattern}: 4 TB on four bytes": _saved(wrap(torch.zeros(1).expand(10**12)), pattern),
        f"{pattern}: a list doubled 40 times": _saved(_doubled(40), pattern),
    }


def _adam(tensor: torch.Tensor) -> dict[str, Any]:
    """Return a state of Adam of one parameter."""
    return {"state": {0: {"step": torch.tensor(1.0), "exp_avg": tensor, "exp_avg_sq": tensor}}, "param_groups": []}


CALIBRATION = {
    **torch_changes("calls*.pt", lambda tensor: [((tensor,), {}, tensor, None, {}, None)]),
    **torch_changes("*layer.pt", lambda tensor: {"codes": tensor, "scale": tensor, "bias": tensor}),
    **torch_changes("state.pt", lambda tensor: {"step": 2, "spreads": [], "values": [tensor], **_adam(tensor)}),
}
TRAINING = {
    **torch_changes("optimizer.bin", _adam),
    **torch_changes("run.pt", lambda tensor: {"lr_scheduler": {}, "ema": {"shadow_params": [tensor]}}),
    **torch_changes("random_states*.pkl", lambda tensor: {"torch_manual_seed": tensor}),
}
LINES: dict[str, Change] = {
    "a line of empty lists": _text(_EMPTY_LISTS, "analysis.jsonl"),
    "a line 3,000,000 deep": _text(_DEEP, "analysis.jsonl"),
}
RECIPE: dict[str, Change] = {
    "20,000,000 empty lists": _text(_EMPTY_LISTS, "recipe.json"),
    "JSON 3,000,000 deep": _text(_DEEP, "recipe.json"),
    "a text of 60 MB": _text(_LONG_TEXT, "recipe.json"),
}
