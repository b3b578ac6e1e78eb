"""Reader of JSON of unknown origin: it bounds size, depth and numbers, and names what is wrong."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from .errors import DamagedFileError, shown

# Bytes of the largest JSON file that is read, unless its reader knows of larger ones: Gemma's tokenizer takes 33 MB.
MAX_BYTES = 36 << 20

# The same of what belongs to a model's weights. The index or header of one with 10,000 tensors takes 1 MB.
MAX_MODEL_BYTES = 16 << 20

# Bytes a value that files take on average, at least: an empty object takes two bytes of a file, 64 of memory.
_BYTES_A_VALUE = 16

# Levels of nesting that are read, far below Python's recursion limit of 1,000.
MAX_DEPTH = 64

# Decimal digits of the longest integer that is read: counts, sizes and offsets fit into 64 bits.
_MAX_DIGITS = 19

# Words for the type of a document, for messages.
_KINDS = {dict: "an object", list: "a list", object: "a value"}


def read_json(
    file: str | os.PathLike[str],
    kind: type = dict,
    *,
    non_finite: bool = False,
    remedy: str = "",
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Read a file with one JSON document in UTF-8, with or without a byte order mark.

    Args:
        file: file to read.
        kind: type of the document, `dict` or `list`; `object` for any.
        non_finite: whether Infinity and NaN are accepted, as Python writes them; some schedulers have such values.
        remedy: advice in the message of the error; when left out, to download or write the file again.
        max_bytes: size of the largest file that is read; it bounds the number of values as well.

    Raises:
        DamagedFileError: the file is empty, too large, not UTF-8, not one JSON document, nested too deeply, of another
            kind, names a key twice, or has numbers that are not finite or do not fit into 64 bits.
        FileNotFoundError: there is no such file.
    """
    path = Path(file)
    content = read_bounded(path, remedy, max_bytes)
    return parse_json(content, path, kind, non_finite=non_finite, remedy=remedy, max_bytes=max_bytes)


def read_bounded(path: Path, remedy: str = "", max_bytes: int = MAX_BYTES) -> bytes:
    """Read the bytes of a file for `parse_json`.

    Args:
        path: file to read.
        remedy: advice in the message of the error.
        max_bytes: size of the largest file that is read.

    Raises:
        DamagedFileError: the file is larger than that, or no regular one.
        FileNotFoundError: there is no such file.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # A device may have no end, a pipe no beginning.
        _refuse(path, "is no regular file", remedy)
    if found.st_size > max_bytes:
        _refuse(path, f"has {found.st_size} bytes; at most {max_bytes} are expected of such a JSON file", remedy)
    return path.read_bytes()


def parse_json(
    content: bytes,
    where: object,
    kind: type = dict,
    *,
    non_finite: bool = False,
    remedy: str = "",
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Parse one JSON document as `read_json` does; `where` names its source in errors.

    Raises:
        DamagedFileError: see `read_json`.
    """
    if not content.strip():
        _refuse(where, f"is damaged: it is empty, {_KINDS[kind]} in JSON is expected", remedy)
    if len(content) > max_bytes or sum(map(content.count, (b",", b"[", b"{"))) > max_bytes // _BYTES_A_VALUE:
        limits = f"{max_bytes} bytes or {max_bytes // _BYTES_A_VALUE} values"
        _refuse(where, f"has more than {limits}, which such JSON never has", remedy)
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


def is_count(value: Any, minimum: int = 0) -> TypeGuard[int]:
    """Return whether a value is an integer of at least `minimum`; `True` is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; `True` is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_list_of(value: Any, kind: type) -> bool:
    """Return whether a value is a list or tuple whose elements are all of a type."""
    return isinstance(value, (list, tuple)) and all(isinstance(element, kind) for element in value)


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ between two mappings, or that one of them lacks; sorted."""
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


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
    """Return the problem of a parsed document, its depth or texts that are no Unicode; None where it has none."""
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
