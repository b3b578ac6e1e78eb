"""Journal of an analysis: finished records survive a kill, and several processes share the work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.errors import DamagedFileError
from ..utils.files import naming_file, write_atomically
from ..utils.json_files import changed_keys, read_json
from .header import Header, Item
from .results import RESULT_FILE, Analysis, check_record, format_record, parse_line

# Names, in the folder of an analysis, of the header's file and of the folder of lines.
_MANIFEST = "manifest.json"
_PARTS = "parts"


def open_journal(folder: Path, header: Header) -> None:
    """Begin an analysis in a folder, or check that the analysis in it is the same.

    Args:
        folder: folder, made where it is missing.
        header: header of the analysis.

    Raises:
        DamagedFileError: the manifest in the folder is damaged.
        ValueError: the folder holds an analysis of another model or of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / _MANIFEST
    if not manifest.is_file():
        write_atomically(manifest, json.dumps(header.to_dict(), indent=1) + "\n")
        return
    existing = read_manifest(folder)
    if existing.run == header.run:
        return
    changed = [key for key in ("method", "model", "metrics") if getattr(existing, key) != getattr(header, key)]
    changed += changed_keys(existing.settings, json.loads(json.dumps(header.settings)))
    raise ValueError(
        f"{folder} holds another analysis (other {', '.join(changed)}); continue with the same arguments, delete it "
        "or choose another folder."
    )


def read_manifest(folder: Path) -> Header:
    """Read the header of the analysis in a folder.

    Raises:
        ValueError: the manifest is damaged.
    """
    manifest = folder / _MANIFEST
    remedy = "Delete the folder, or choose another one."
    return Header.from_dict(read_json(manifest, remedy=remedy), str(manifest))


def read_records(folder: Path, header: Header) -> dict[Item, dict[str, float | None]]:
    """Read the finished records of all processes and earlier runs.

    Args:
        folder: folder of the analysis.
        header: header of the analysis.

    Returns:
        Metrics by (layer, bits).

    Raises:
        ValueError: a line that is not the last of its file is damaged, or a line is of another analysis.
    """
    if (folder / RESULT_FILE).is_file():
        return {item: dict(metrics) for item, metrics in Analysis.load(folder).records.items()}
    records = {}
    for file in sorted((folder / _PARTS).glob("*.jsonl")):
        lines, _ = _whole_lines(file)
        for number, line in enumerate(lines, start=1):
            item, metrics = check_record(line, header, f"{file}, line {number}")
            records[item] = metrics
    return records


class Journal:
    """Writer of the lines of one process; each is on the disk before the next is begun.

    A last line that was cut short, by a kill or a full disk, is dropped.

    Args:
        folder: folder of the analysis.
        header: header of the analysis.
        process: number of this process; running processes must have different numbers.
    """

    def __init__(self, folder: Path, header: Header, process: int) -> None:
        self._header = header
        self._file = file = folder / _PARTS / f"{process:04}.jsonl"
        file.parent.mkdir(exist_ok=True)
        if file.is_symlink():  # Another file would be written, or cut.
            raise DamagedFileError(file, "is a link", "Delete it.")
        file.touch()
        _, whole = _whole_lines(file)
        self._stream = file.open("r+b", buffering=0)  # Closing writes nothing.
        self._stream.truncate(whole)
        self._stream.seek(whole)

    def append(self, item: Item, metrics: Mapping[str, float | None]) -> None:
        """Write one line through to the disk.

        Raises:
            OSError: it cannot be written, for example to a full disk; the message names the file.
        """
        line = json.dumps(format_record(self._header, item, metrics), allow_nan=False).encode() + b"\n"
        with naming_file(self._file):
            while line:  # A disk that becomes full takes a part of it.
                line = line[self._stream.write(line) :]
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def finish(folder: Path, header: Header) -> Analysis:
    """Merge the lines of all processes into the one file of the finished analysis.

    Args:
        folder: folder of the analysis.
        header: header of the analysis.

    Raises:
        ValueError: see `read_records`.
    """
    records = read_records(folder, header)
    analysis = Analysis(header, {item: records[item] for item in header.items})
    if not (folder / RESULT_FILE).is_file():
        write_atomically(folder / RESULT_FILE, analysis.to_text())
    shutil.rmtree(folder / _PARTS, ignore_errors=True)
    return analysis


def _whole_lines(file: Path) -> tuple[list[Any], int]:
    """Read the lines of a file, without a last one that was cut short.

    Returns:
        (parsed lines, their length in bytes).

    Raises:
        DamagedFileError: another line is damaged.
    """
    content = file.read_bytes()
    lines, whole = [], 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        is_last = whole + len(line) == len(content)
        try:
            if not line.endswith(b"\n"):
                break
            lines.append(parse_line(line, f"{file}, line {number}"))
        except ValueError:
            if is_last:
                break
            raise
        whole += len(line)
    return lines, whole
