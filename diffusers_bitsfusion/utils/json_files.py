"""The one reader of JSON that others may have written: it bounds size, depth and numbers, and names what is wrong."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from .errors import DamagedFileError, shown

# An index of a model with 10,000 tensors takes 1 MB, an analysis of Stable Diffusion 0.3 MB.
MAX_BYTES = 64 << 20
MAX_DEPTH = 64
# Whatever counts, sizes and offsets there are fit into 64 bits.
_MAX_DIGITS = 19

_KINDS = {dict: "an object", list: "a list", object: "a value"}


def read_json(file: str | os.PathLike[str], kind: type = dict, *, non_finite: bool = False, remedy: str = "") -> Any:
    """Read a file with one JSON document in UTF-8, with or without a byte order mark.

    Args:
        file: to read.
        kind: `dict` or `list`, what the document must be; `object` for anything.
        non_finite: whether Infinity and NaN are taken, as Python writes them; diffusers' schedulers have such values.
        remedy: what the reader of the error should do; to get the file again where left out.

    Raises:
        DamagedFileError: the file is empty, too large, not UTF-8, not one JSON document, nested too deeply, of another
            kind, names a key twice, or has numbers that are not finite or do not fit into 64 bits.
        FileNotFoundError: there is no such file.
    """
    path = Path(file)
    return parse_json(read_bounded(path, remedy), path, kind, non_finite=non_finite, remedy=remedy)


def read_bounded(path: Path, remedy: str = "") -> bytes:
    """Read a file for `parse_json`.

    Raises:
        DamagedFileError: it is larger than any JSON file that is expected.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        _refuse(path, f"has {size} bytes; at most {MAX_BYTES} are expected of a JSON file", remedy)
    return path.read_bytes()


def parse_json(content: bytes, where: object, kind: type = dict, *, non_finite: bool = False, remedy: str = "") -> Any:
    """As `read_json`, for what has been read already; `where` names it in errors."""
    if not content.strip():
        _refuse(where, f"is damaged: it is empty, {_KINDS[kind]} in JSON is expected", remedy)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(where, f"is not UTF-8 text ({error.reason} at byte {error.start})", remedy)
    try:
        document = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=float if non_finite else _finite,
            parse_constant=float if non_finite else _no_constant,
        )
    except RecursionError:
        _refuse(where, f"is damaged: it is nested more than {MAX_DEPTH} deep", remedy)
    except ValueError as error:
        _refuse(where, f"is damaged: it is not one JSON document ({error})", remedy)
    if not isinstance(document, kind):
        _refuse(where, f"holds {shown(document, 60)} where {_KINDS[kind]} is expected", remedy)
    if problem := _problem(document, check_texts="\\ud" in text.lower()):
        _refuse(where, f"is damaged: it {problem}", remedy)
    return document


def is_count(value: Any, least: int = 0) -> bool:
    """Whether it is an integer from `least`; `True` is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether it is a finite number; `True` is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_list_of(value: Any, kind: type) -> bool:
    """Whether it is a list or tuple whose every element is of a type."""
    return isinstance(value, (list, tuple)) and all(isinstance(element, kind) for element in value)


def changed_keys(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ between two mappings, or that one of them lacks; sorted."""
    return sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))


def _refuse(where: object, problem: str, remedy: str) -> NoReturn:
    raise DamagedFileError(where, problem, *([remedy] if remedy else [])) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(name for name in names if names.count(name) > 1), 60)} is there twice")
    return content


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"the number {digits[:_MAX_DIGITS]}… has {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _problem(document: Any, check_texts: bool) -> str | None:
    """What is wrong within a parsed document: depth, and texts that are no Unicode; None where nothing is."""
    level = [document]
    for _ in range(MAX_DEPTH):
        if check_texts and any(not _is_unicode(value) for value in level):
            return "holds a text with half of a surrogate pair, which is no Unicode"
        level = [part for value in level if isinstance(value, (dict, list)) for part in _parts(value, check_texts)]
        if not level:
            return None
    return f"is nested more than {MAX_DEPTH} deep"


def _parts(value: dict[str, Any] | list[Any], keys: bool) -> list[Any]:
    if isinstance(value, list):
        return value
    return [*value, *value.values()] if keys else list(value.values())


def _is_unicode(value: Any) -> bool:
    if not isinstance(value, str):
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
