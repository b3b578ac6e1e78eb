"""An analysis while it runs: what is done survives being killed, and several processes share the work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.files import write_atomically
from ..utils.json_files import changed_keys, read_json
from .results import RESULT_FILE, Analysis, Header, Item, check_record, format_record, parse_line

_MANIFEST = "manifest.json"
_PARTS = "parts"


def open_journal(folder: Path, header: Header) -> None:
    """Begin an analysis in a folder, or check that the one there is the same.

    Raises:
        ValueError: the folder holds an analysis of another model or of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / _MANIFEST
    if not manifest.is_file():
        write_atomically(manifest, json.dumps(header.to_dict(), indent=1) + "\n")
        return
    found = read_manifest(folder)
    if found.run == header.run:
        return
    changed = [key for key in ("method", "model", "metrics") if getattr(found, key) != getattr(header, key)]
    changed += changed_keys(found.settings, json.loads(json.dumps(header.settings)))
    raise ValueError(
        f"{folder} holds another analysis (other {', '.join(changed)}); go on with the same arguments, delete it or "
        "choose another folder."
    )


def read_manifest(folder: Path) -> Header:
    """The header of the analysis in a folder.

    Raises:
        ValueError: the manifest is damaged.
    """
    manifest = folder / _MANIFEST
    remedy = "Delete the folder, or choose another one."
    return Header.from_dict(read_json(manifest, remedy=remedy), str(manifest))


def read_records(folder: Path, header: Header) -> dict[Item, dict[str, float | None]]:
    """What is done, by any process of any earlier run.

    Raises:
        ValueError: a line is damaged that is not the last of its file, or is of another analysis.
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
    """The lines of one process, each on the disk before the next is begun.

    A last line that was cut short, by a kill or a full disk, is dropped.

    Args:
        folder: of the analysis.
        header: of the analysis.
        process: number of this process; no two that run at once may share one.
    """

    def __init__(self, folder: Path, header: Header, process: int) -> None:
        self._header = header
        file = folder / _PARTS / f"{process:04}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.touch()
        _, whole = _whole_lines(file)
        self._stream = file.open("r+b")
        self._stream.truncate(whole)
        self._stream.seek(whole)

    def append(self, item: Item, metrics: Mapping[str, float | None]) -> None:
        """Write one line through to the disk."""
        line = json.dumps(format_record(self._header, item, metrics), allow_nan=False)
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def finish(folder: Path, header: Header) -> Analysis:
    """Merge the lines of all processes into the one file of the finished analysis."""
    records = read_records(folder, header)
    analysis = Analysis(header, {item: records[item] for item in header.items})
    if not (folder / RESULT_FILE).is_file():
        write_atomically(folder / RESULT_FILE, analysis.to_text())
    shutil.rmtree(folder / _PARTS, ignore_errors=True)
    return analysis


def _whole_lines(file: Path) -> tuple[list[Any], int]:
    """(parsed lines but for a last one cut short, their length in bytes).

    Raises:
        ValueError: another line is damaged.
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
