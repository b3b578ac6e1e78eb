"""Files that are complete or not there, and folders that belong to one set of settings."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .json_files import changed_keys, read_json

SETTINGS_FILE = "settings.json"


def flush_file(file: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with file.open("r+b") as stream:  # Windows flushes only what may be written
        os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; not every system lets a folder be opened for that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
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
    """CRC-32 of a file's content, eight hexadecimal digits."""
    checksum = 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            checksum = zlib.crc32(piece, checksum)
    return f"{checksum:08x}"


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Give a path to write to, whose file then takes the place of `path`, flushed; on an error nothing is left.

    Raises:
        OSError: the file cannot be written; the message names `path`, and what was there before stays.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        yield partial
        flush_file(partial)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if is_write_error(error):
            raise OSError(
                f"Could not write {path}: {error}. What was there before is kept; do the same again when there is "
                "room."
            ) from error
        raise
    flush_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, a text in UTF-8, that is either there and complete or as it was before.

    Raises:
        OSError: see `replacing_file`.
    """
    with replacing_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def is_write_error(error: BaseException) -> bool:
    """Whether an error says that the disk took no more; torch and safetensors have their own for that."""
    words = ("enforce fail", "PytorchStreamWriter", "I/O error", "No space left", "Disk quota", "File too large")
    return isinstance(error, OSError) or (
        (isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError")
        and any(word in str(error) for word in words)
    )


def claim_folder(
    folder: Path, settings: Mapping[str, Any], *, kind: str, clash: str, other: str, prefix: str = ""
) -> None:
    """Take a folder for results that depend on `settings`, or check that it has been taken with the same.

    Hidden files, locks among them, are not looked at.

    Args:
        folder: made where it is missing.
        settings: JSON-safe; all that the results depend on.
        kind: what is in such a folder, for messages: "calibration".
        clash: that it is another, for messages, with a place for the settings: "holds a calibration with other {}".
        other: how to get another folder, for messages: "choose another cache_dir".
        prefix: of the settings' file, where several processes have their own.

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
    """Make a folder where it is missing, and refuse one that holds files but no settings; as `claim_folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [file.name for file in folder.iterdir() if not file.name.startswith(".")]
    if names and not any(name.endswith(SETTINGS_FILE) for name in names):
        raise ValueError(f"{folder} is not empty and holds no {kind}; {other}.")
