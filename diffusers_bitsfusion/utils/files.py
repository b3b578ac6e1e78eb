"""Files that are complete or missing, never partial, and folders that belong to one set of settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .crc32 import crc32
from .json_files import changed_keys, read_json

# Name of the file of settings in a folder that belongs to them; a process number may come before it.
SETTINGS_FILE = "settings.json"


def flush_file(file: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with file.open("r+b") as stream:  # Windows flushes only files that are open for writing.
        os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, on systems that let a folder be opened for that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Wait until all files in a folder and its folders, and their names, are on the disk."""
    for file in sorted(folder.rglob("*")):
        if file.is_dir():
            flush_folder(file)
        else:
            flush_file(file)
    flush_folder(folder)


def file_checksum(file: Path) -> str:
    """Return the CRC-32 of the content of a file, in eight hexadecimal digits."""
    checksum = 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            checksum = crc32(piece, checksum)
    return f"{checksum:08x}"


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Give a path to write to, whose file then replaces `path`, flushed; on an error it is removed.

    Args:
        path: file to replace; its folder exists.

    Raises:
        OSError: the file cannot be written; the message names `path`, and the earlier file is kept.
    """
    partial = path.with_name(f".{path.name}.part")
    partial.unlink(missing_ok=True)  # It may be a link to a file elsewhere.
    with naming_file(path):
        try:
            yield partial
            flush_file(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    flush_folder(path.parent)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Name a file in the error of a failed write, which says that the disk is full but not where.

    Args:
        path: file that the block writes, and of which an earlier content is not lost.

    Raises:
        OSError: the block could not write; the message says what is kept and what to do.
    """
    try:
        yield
    except Exception as error:
        if not is_write_error(error):
            raise
        raise OSError(
            f"Could not write {path}: {_first_line(error)}. What was there before is kept; do the same again when "
            "there is room."
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a kill at any moment leaves the new content or the earlier file.

    Args:
        path: file to write.
        content: bytes, or a text for UTF-8.

    Raises:
        OSError: see `replacing_file`.
    """
    with replacing_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def is_write_error(error: BaseException) -> bool:
    """Return whether an error reports a failed write; torch and safetensors have exceptions of their own for that."""
    words = ("enforce fail", "PytorchStreamWriter", "I/O error", "No space left", "Disk quota", "File too large")
    return isinstance(error, OSError) or (
        (isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError")
        and any(word in str(error) for word in words)
    )


def claim_folder(
    folder: Path, settings: Mapping[str, Any], *, kind: str, clash: str, other: str, prefix: str = ""
) -> None:
    """Claim a folder for results that depend on `settings`, or check that it was claimed with the same settings.

    Hidden files, locks among them, are ignored.

    Args:
        folder: folder, made where it is missing.
        settings: JSON-safe settings that the results depend on.
        kind: content of such a folder, for messages: "calibration".
        clash: words for other settings, for messages, with a place for their names: "holds a calibration with other
            {}".
        other: advice to use another folder, for messages: "choose another cache_dir".
        prefix: prefix of the file of settings, where several processes have their own.

    Raises:
        ValueError: the folder belongs to other settings, or holds files but no settings.
        DamagedFileError: its settings cannot be read.
    """
    refuse_foreign_files(folder, kind, other)
    note = folder / f"{prefix}{SETTINGS_FILE}"
    if not note.is_file():
        write_atomically(note, json.dumps(settings, indent=2) + "\n")
        return
    remedy = f"Delete {folder}, or {other}."
    changed = changed_keys(read_json(note, non_finite=True, remedy=remedy), json.loads(json.dumps(settings)))
    if changed:
        raise ValueError(f"{folder} {clash.format(', '.join(changed))}; delete it, or {other}.")


def refuse_foreign_files(folder: Path, kind: str, other: str) -> None:
    """Make a folder where it is missing, and refuse a folder that holds files but no settings.

    Args:
        folder: folder, made where it is missing.
        kind: content of such a folder, for messages.
        other: advice to use another folder, for messages.

    Raises:
        ValueError: the folder holds files but no settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [file.name for file in folder.iterdir() if not file.name.startswith(".")]
    if names and not any(name.endswith(SETTINGS_FILE) for name in names):
        raise ValueError(f"{folder} is not empty and holds no {kind}; {other}.")
