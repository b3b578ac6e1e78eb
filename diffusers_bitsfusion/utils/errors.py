"""The package's own errors of files and folders; each is a subclass of what earlier versions raised."""

from __future__ import annotations


class DamagedFileError(ValueError):
    """A file is not what it should be: cut short, changed, of another format, or with values that cannot be.

    Args:
        where: the file, and the place in it where that is known.
        problem: what was found and what was expected, the rest of a sentence that begins with `where`.
        remedy: what to do, a sentence of its own.
    """

    def __init__(self, where: object, problem: str, remedy: str = "Download it again, or write it anew."):
        super().__init__(f"{printable(where)} {printable(problem).rstrip('.')}. {printable(remedy)}")


class UnfinishedSaveError(ValueError):
    """A save into a folder was killed after its files had begun to take the place of older ones."""


class FolderInUseError(OSError):
    """Another process is writing the folder."""


def printable(text: object) -> str:
    """The text with whatever no UTF-8 stream takes (lone surrogates) as backslash escapes."""
    return str(text).encode("utf-8", errors="backslashreplace").decode("utf-8")


def shown(value: object, limit: int = 200) -> str:
    """The repr of a value from a file, printable and cut to `limit` characters, for error messages."""
    try:
        text = printable(repr(value))
    except ValueError:  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} that is too large to print"
    return text if len(text) <= limit else f"{text[:limit]}…"
