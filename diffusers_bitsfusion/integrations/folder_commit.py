"""Replacing the files of a model's or pipeline's folder so that a kill at any moment leaves no mixture.

New files are written into a hidden folder within the one to be changed, and flushed. A journal beside them, written
atomically, commits the save. Only then do files move: first every config.json is replaced by one that says that the
save is not finished, which loading refuses; then the weights move; then the configs. The next save, or
`bitsfusion inspect FOLDER --repair`, finishes the saves that have a journal and removes the others.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..codec.weight_files import stem
from ..config.bitsfusion import unfinished_config
from ..utils.errors import DamagedFileError, UnfinishedSaveError
from ..utils.files import flush_folder, flush_tree, is_write_error, write_atomically
from ..utils.json_files import is_list_of, read_json

# Beginning of the names of the hidden folders that saves write into.
PREFIX = ".saving-"

# Names within such a folder: the new files, the journal, the lock.
_FILES = "files"
_JOURNAL = "commit.json"
_LOCK = "lock"

# Name of the config of a model, in diffusers and transformers.
_CONFIG = "config.json"


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Give a scratch folder whose files replace those in `directory` if the block ends without an error.

    Weight files of an earlier save that the new one does not have (other shards, their index) are removed. Saves that
    were killed are finished or removed first.

    Args:
        directory: folder of a model or pipeline, made where it is missing.

    Raises:
        OSError: the disk is full, or the folder cannot be written; the earlier files are kept, or the message names
            the command that finishes the save.
    """
    directory.mkdir(parents=True, exist_ok=True)
    finish_saves(directory)
    with private_folder(directory) as scratch:
        files = scratch / _FILES
        files.mkdir()
        try:
            yield files
            flush_tree(files)
            names = sorted(file.relative_to(files).as_posix() for file in files.rglob("*") if file.is_file())
            write_atomically(scratch / _JOURNAL, json.dumps({"files": names}) + "\n")
        except Exception as error:
            if is_write_error(error) and not isinstance(error, OSError):
                raise OSError(
                    f"Could not save {directory}: {error}. What was there before is kept; do the same again when "
                    "there is room."
                ) from error
            raise
        try:
            _roll_forward(directory, scratch)
        except OSError as error:
            raise OSError(
                f"Could not finish saving {directory}: {error}. Finish it by `bitsfusion inspect {str(directory)!r} "
                "--repair`, or save again."
            ) from error


@contextmanager
def private_folder(directory: Path) -> Iterator[Path]:
    """Give a hidden folder in `directory` that other processes do not touch until the block or this process ends.

    On an error a folder with a journal stays: its save is committed, and has to be finished.

    Args:
        directory: existing folder.

    Raises:
        OSError: the folder cannot be written.
    """
    scratch, lock = _locked_folder(directory)
    try:
        yield scratch
    except BaseException:
        if not (scratch / _JOURNAL).exists():
            _remove(scratch, lock)
        lock.release()
        raise
    _remove(scratch, lock)


def finish_saves(directory: Path) -> int:
    """Finish the saves into a folder that were killed after their journal was written, and remove the others.

    Saves of running processes are not touched.

    Args:
        directory: folder of a model or pipeline.

    Returns:
        Number of saves that were finished.

    Raises:
        DamagedFileError: a journal is damaged.
        OSError: the folder cannot be written.
    """
    finished = 0
    for scratch in sorted(directory.glob(f"{PREFIX}*"), key=_age):
        if _is_new(scratch):
            continue
        lock = FileLock(scratch / _LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # Another process holds it, or has removed it.
            continue
        try:
            if (scratch / _JOURNAL).exists():
                _roll_forward(directory, scratch)
                finished += 1
        finally:
            if not (scratch / _JOURNAL).exists():
                _remove(scratch, lock)
            lock.release()
    return finished


def repair(directory: Path) -> int:
    """Finish the saves into a folder, and into the folders within it, that were killed.

    Args:
        directory: folder of a model or pipeline.

    Returns:
        Number of saves that were finished.

    Raises:
        DamagedFileError: a journal or a config is damaged.
        UnfinishedSaveError: a config says that a save is not finished, but the rest of its files is missing.
    """
    finished = sum(finish_saves(folder.parent) for folder in sorted(directory.rglob(f"{PREFIX}*")) if folder.exists())
    for config in sorted(directory.rglob(_CONFIG)):
        if unfinished_config(read_json(config, non_finite=True)) is not None:
            raise UnfinishedSaveError(
                f"{config} is of a save that was cut off, and the rest of it is not there: save the model again."
            )
    return finished


def _is_new(scratch: Path) -> bool:
    """Return whether the folder has no lock yet, or is gone; an empty one is removed, which its process notices.

    A link to a folder elsewhere is no save's, and nothing is removed or moved there.
    """
    try:
        scratch.rmdir()
    except OSError:
        return scratch.is_symlink() or not scratch.is_dir()
    return True


def _locked_folder(directory: Path) -> tuple[Path, FileLock]:
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
        lock = FileLock(scratch / _LOCK)
        try:
            lock.acquire()
        except FileNotFoundError:  # Another process removed it before its lock was there.
            continue
        if (scratch / _LOCK).exists():
            return scratch, lock
        lock.release()


def _age(scratch: Path) -> float:
    try:
        return (scratch / _JOURNAL).stat().st_mtime_ns
    except OSError:
        return 0


def _remove(scratch: Path, lock: FileLock) -> None:
    """Remove the folder, the lock last, so that no other process works on half of it."""
    for entry in list(scratch.iterdir()) if scratch.is_dir() else []:
        if entry.name == _LOCK:
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    lock.release()
    shutil.rmtree(scratch, ignore_errors=True)


def _roll_forward(directory: Path, scratch: Path) -> None:
    """Move the files that the journal lists and that have not been moved; repeating it is safe."""
    names = read_json(scratch / _JOURNAL).get("files")
    if not is_list_of(names, str) or any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise DamagedFileError(scratch / _JOURNAL, "is damaged: it must list files", f"Delete {scratch}; save again.")
    if any(path.is_symlink() for path in scratch.rglob("*")):
        raise DamagedFileError(
            scratch, "is of no save: it holds links to other files", f"Delete {scratch}; save again."
        )
    with _moving_alone(directory):
        flush_folder(scratch)
        flush_folder(directory)
        configs = [name for name in names if Path(name).name == _CONFIG]
        for name in configs:
            _mark_unfinished(directory, scratch, name)
        others = [name for name in names if Path(name).name != _CONFIG]
        for name in others:
            _move(directory, scratch, name)
        for folder, new in _by_folder(names).items():
            for file in _stale_weights(directory / folder, new):
                file.unlink(missing_ok=True)
            flush_folder(directory / folder)
        for name in configs:
            _move(directory, scratch, name)
        for folder in _by_folder(names):
            flush_folder(directory / folder)
        (scratch / _JOURNAL).unlink()


@contextmanager
def _moving_alone(directory: Path) -> Iterator[None]:
    """Keep other processes from moving files into the folder, where the system has locks on folders."""
    try:
        import fcntl
    except ImportError:  # Windows has no locks on folders.
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # Some network file systems have no such locks.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _mark_unfinished(directory: Path, scratch: Path, name: str) -> None:
    """Replace a config by one that loading refuses, where the new config has not been moved already."""
    new = scratch / _FILES / name
    if not new.exists():
        return
    target = directory / name
    target.parent.mkdir(parents=True, exist_ok=True)
    content = read_json(new, non_finite=True)
    content["quantization_config"] = {"quant_method": "bitsfusion", "unfinished_save": str(directory.absolute())}
    marked = scratch / "marked.json"
    write_atomically(marked, json.dumps(content) + "\n")
    os.replace(marked, target)
    flush_folder(target.parent)


def _move(directory: Path, scratch: Path, name: str) -> None:
    source, target = scratch / _FILES / name, directory / name
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)


def _by_folder(names: Sequence[str]) -> dict[Path, set[str]]:
    folders: dict[Path, set[str]] = {}
    for name in names:
        folders.setdefault(Path(name).parent, set()).add(Path(name).name)
    return folders


def _stale_weights(folder: Path, new: set[str]) -> list[Path]:
    """Return the old weight files and indices in `folder` whose name stems, without shard numbers, are among `new`."""
    stems = {stem(name) for name in new} - {None}
    return [file for file in folder.iterdir() if file.is_file() and file.name not in new and stem(file.name) in stems]
