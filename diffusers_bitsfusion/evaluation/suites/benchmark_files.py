"""Question and prompt files of published benchmarks, read with errors that say where to get the right file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...utils.json_files import parse_json, read_bounded

# Bytes of the largest file that is read: the captions of COCO's training images take 92 MB.
_MAX_BYTES = 128 << 20


def read_benchmark(path: str | os.PathLike[str], what: str, source: str) -> Any:
    """Read a file with one JSON document.

    Args:
        path: the file.
        what: the expected content, for the error.
        source: where it can be downloaded, for the error.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is not UTF-8, not JSON, or not as `utils.json_files` bounds JSON.
    """
    content, where = _content(path, what, source), f"{path} is not {what}: it"
    return parse_json(content, where, object, remedy=_remedy(source), max_bytes=_MAX_BYTES)


def read_benchmark_lines(path: str | os.PathLike[str], what: str, source: str) -> list[dict[str, Any]]:
    """Read a file with a JSON object a line; the arguments and errors are those of `read_benchmark`."""
    lines = [
        parse_json(text, f"{path} is not {what}: line {number}", remedy=_remedy(source))
        for number, text in enumerate(_content(path, what, source).splitlines(), start=1)
        if text.strip()
    ]
    if not lines:
        raise wrong_file(path, what, source, "it is empty")
    return lines


def require_fields(item: Any, fields: Mapping[str, type], where: str, what: str, source: str) -> None:
    """Refuse an entry that lacks a field, or has it in another type.

    Raises:
        ValueError: naming the field, the place, and where the right file can be downloaded.
    """
    if not isinstance(item, dict):
        raise wrong_file(where, what, source, f"{item!r} is not a JSON object")
    for name, kind in fields.items():
        if name not in item:
            raise wrong_file(where, what, source, f"there is no {name!r}; there are {', '.join(map(repr, item))}")
        if not isinstance(item[name], kind) or isinstance(item[name], bool):
            raise wrong_file(where, what, source, f"{name!r} is {item[name]!r}, not of type {kind.__name__}")


def wrong_file(where: str | os.PathLike[str], what: str, source: str, reason: str) -> ValueError:
    """Return the error for a file that is not what its suite needs."""
    return ValueError(f"{os.fspath(where)} is not {what}: {reason}. {_remedy(source)}")


def _content(path: str | os.PathLike[str], what: str, source: str) -> bytes:
    try:
        return read_bounded(Path(path), _remedy(source), _MAX_BYTES)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {os.fspath(path)}. Download {what} from {source}.") from error


def _remedy(source: str) -> str:
    return f"Download it from {source}."
