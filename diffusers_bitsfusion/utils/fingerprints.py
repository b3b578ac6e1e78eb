"""Hashes that tell settings, models and folders apart; what they give is kept in files, so they never change."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# By bytes of an element.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_MODEL_FILES = (".json", ".safetensors", ".bin")


def hash_of_text(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_of_settings(settings: Any) -> str:
    """SHA-256 of JSON-safe content, whatever the order of its keys."""
    return hash_of_text(json.dumps(settings, sort_keys=True))


def hash_of_weights(model: nn.Module) -> str:
    """SHA-256 of all weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def hash_of_sums(model: nn.Module) -> str:
    """Tells models apart by their parameters' names, shapes and sums of bits as integers; fast on any device."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        total = None  # of what is offloaded
        if not parameter.is_meta:
            bits = parameter.detach().contiguous().flatten().view(_INTEGERS[parameter.element_size()])
            total = int(bits.sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(parameter.shape)} {total}\n".encode())
    return digest.hexdigest()


def hash_of_first_values(beginning: str, parameters: Iterable[tuple[str, Tensor, bool]]) -> str:
    """Tells prepared models apart by names, shapes and first values; 16 hexadecimal digits.

    Args:
        beginning: hashed before the parameters.
        parameters: name, tensor, and whether its values count.
    """
    digest = hashlib.sha256(beginning.encode())
    for name, parameter, counts in parameters:
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if counts:
            digest.update(parameter.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def hash_of_folder(path: str | os.PathLike[str]) -> str:
    """Changes when a file of a local model or pipeline does; the id itself for one on the Hub."""
    folder = Path(path)
    if not folder.is_dir():
        return os.fspath(path)
    files = sorted(file for file in folder.rglob("*") if file.suffix in _MODEL_FILES)
    state = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hash_of_text(repr(state))
