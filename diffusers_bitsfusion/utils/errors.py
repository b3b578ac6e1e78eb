"""Exceptions for files and folders; each is a subclass of the exception that earlier versions raised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class DamagedFileError(ValueError):
    """Exception for a file that is cut short, changed, of another format, or holds impossible values.

    Readers of checkpoints, recipes, analyses, calibrations and training folders raise it. The message names the file,
    the place in it where that is known, the problem and the remedy. It is a `ValueError`.

    Args:
        where: file, and the place in it where that is known.
        problem: actual and expected content; the rest of a sentence that begins with `where`.
        remedy: sentence that says what to do.
    """

    def __init__(self, where: object, problem: str, remedy: str = "Download it again, or write it anew.") -> None:
        super().__init__(f"{printable(where)} {printable(problem).rstrip('.')}. {printable(remedy)}")


class UnfinishedSaveError(ValueError):
    """Exception for a folder in which a save was killed while its files replaced older ones.

    Loading raises it, since the folder holds files of both saves; so does a repair that lacks the rest of the new
    files. The message names the folder and the command that finishes the save, or says to save the model again. It is
    a `ValueError`.
    """


class FolderInUseError(OSError):
    """Exception for a folder that another process is writing.

    A second calibration into one folder raises it before it samples. The message names the folder and,
    where known, the process and its machine. It is an `OSError`.
    """


def printable(text: object) -> str:
    """Return a text whose lone surrogates, which UTF-8 cannot encode, are backslash escapes."""
    return str(text).encode("utf-8", errors="backslashreplace").decode("utf-8")


def shown(value: object, limit: int = 200) -> str:
    """Return the repr of a value from a file for error messages, printable and cut to `limit` characters."""
    text = ""
    for piece in _pieces(value, limit):
        text += piece
        if len(text) > limit:
            return f"{printable(text[:limit])}…"
    return printable(text)


def _pieces(value: Any, limit: int) -> Iterator[str]:
    """Yield the repr of a value in pieces, so that no more of a large one is made than is shown."""
    if isinstance(value, str):
        yield repr(value[: limit + 1])
    elif type(value) in (list, tuple):
        yield "[" if isinstance(value, list) else "("
        for number, part in enumerate(value):
            yield ", " if number else ""
            yield from _pieces(part, limit)
        yield "]" if isinstance(value, list) else ",)" if len(value) == 1 else ")"
    elif type(value) is dict:
        yield "{"
        for number, (key, part) in enumerate(value.items()):
            yield ", " if number else ""
            yield from _pieces(key, limit)
            yield ": "
            yield from _pieces(part, limit)
        yield "}"
    else:
        try:
            yield repr(value)
        except ValueError:  # Python refuses to print integers of too many digits.
            yield f"a {type(value).__name__} that is too large to print"
