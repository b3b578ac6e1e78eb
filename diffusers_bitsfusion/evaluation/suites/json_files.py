"""Question and prompt files in the suites' own formats, read with errors that say where to get the right file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: str | os.PathLike[str], what: str, source: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: what should be in it, for the error.
        source: where it can be downloaded, for the error.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or not JSON.
    """
    try:
        return json.loads(_text(path, what, source))
    except json.JSONDecodeError as error:
        raise wrong_file(path, what, source, f"it is not JSON ({error})") from error


def read_json_lines(path: str | os.PathLike[str], what: str, source: str) -> list[dict[str, Any]]:
    """Read a file with a JSON object a line; the arguments and errors are those of `read_json`."""
    lines = []
    for number, text in enumerate(_text(path, what, source).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise wrong_file(path, what, source, f"line {number} is not JSON ({error})") from error
        if not isinstance(line, dict):
            raise wrong_file(path, what, source, f"line {number} is not a JSON object")
        lines.append(line)
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
    return ValueError(f"{os.fspath(where)} is not {what}: {reason}. Download it from {source}.")


def _text(path: str | os.PathLike[str], what: str, source: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise wrong_file(path, what, source, "it is not UTF-8 text") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {os.fspath(path)}. Download {what} from {source}.") from error
