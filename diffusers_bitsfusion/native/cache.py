"""The folder that keeps the compiled library: private, checked before each use, and free of leftovers.

A library's name ends with a digest of its content. A file that was cut or damaged is thus never loaded, and two
processes that build at the same time cannot mix what they write.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # On Windows each process builds for itself, and the first to finish keeps its result.
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".dll" if os.name == "nt" else ".so"

# Hexadecimal digits of the content's digest, which end a library's name.
DIGEST_LENGTH = 32

_PREFIX, _SCRATCH = "native-", "build-"
# Folders that version 0.1 built in.
_OLD_SCRATCH = "tmp"

# Seconds that a process waits for another one that builds the same, before it builds, too.
_PATIENCE = 120.0


@contextmanager
def kept_library(sources: str, machine: str, build: Callable[[Path], None]) -> Iterator[Path]:
    """Give the path of a library that may be loaded, built where it is missing or damaged.

    It is kept in the user's cache, where that is a folder that no one else may write; else it is built for this
    process alone, and removed afterwards.

    Args:
        sources: digest of what the library is made of.
        machine: digest of what it is made for.
        build: writes the library to a path.

    Raises:
        OSError: there is no place to build in. `build` raises its own errors.
    """
    with ExitStack() as exit_stack:
        folder = _private_cache()
        if folder is None:
            yield _built_for_this_process(build, exit_stack)
            return
        name = f"{_PREFIX}{sources}-{machine}"
        yield _whole_library(folder, name) or _build_alone(folder, name, sources, build)


def content_digest(library: Path) -> str:
    """Return the digest that ends the name of a library."""
    return hashlib.sha256(library.read_bytes()).hexdigest()[:DIGEST_LENGTH]


def with_digest(library: Path, content: Path) -> Path:
    """Return the path `library` with the digest of a file's content in its name."""
    return library.with_name(f"{library.stem}-{content_digest(content)}{library.suffix}")


def is_whole(library: Path) -> bool:
    """Return whether a library has the content whose hash its name contains."""
    return library.is_file() and library.stem.endswith(f"-{content_digest(library)}")


def _private_cache() -> Path | None:
    """Return the folder in the user's cache, made where missing; None where that fails or others may write there."""
    try:
        folder = _cache_home() / "diffusers_bitsfusion"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.name == "nt":  # The folder is the user's own by the system's default.
            return folder
        found = folder.stat()
        if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None
        folder.chmod(0o700)
        return folder if os.access(folder, os.W_OK | os.X_OK) else None
    except (OSError, RuntimeError):  # RuntimeError means that there is no home folder.
        return None


def _cache_home() -> Path:
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # Relative paths are invalid (XDG Base Directory Specification).
        return Path(named)
    if os.name == "nt" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local)
    return Path.home() / ".cache"


def _built_for_this_process(build: Callable[[Path], None], exit_stack: ExitStack) -> Path:
    folder = tempfile.mkdtemp(prefix="diffusers_bitsfusion-")  # Its mode is 0700.
    exit_stack.callback(shutil.rmtree, folder, ignore_errors=True)  # A library that is loaded needs its file no more.
    library = Path(folder) / f"native{SUFFIX}"
    build(library)
    return library


def _whole_library(folder: Path, name: str) -> Path | None:
    return next(filter(is_whole, folder.glob(f"{name}-*{SUFFIX}")), None)


def _build_alone(folder: Path, name: str, sources: str, build: Callable[[Path], None]) -> Path:
    """Build while other processes that want the same wait; they then find it."""
    with _locked(folder, _PATIENCE) as locked:
        found = _whole_library(folder, name)
        if found is not None:
            return found
        if locked:
            _remove_leftovers(folder, name, sources)
        with tempfile.TemporaryDirectory(dir=folder, prefix=_SCRATCH, ignore_cleanup_errors=True) as scratch:
            built = Path(scratch) / f"native{SUFFIX}"
            with _locked(Path(scratch), _PATIENCE):  # Others may remove what no process holds.
                build(built)
            built.chmod(0o700)
            return built.replace(with_digest(folder / f"{name}{SUFFIX}", built))  # Renaming is atomic.


@contextmanager
def _locked(folder: Path, patience: float) -> Iterator[bool]:
    """Hold a folder's lock, which ends with the process; False where there is none or it is not got in time."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(descriptor, patience)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        except OSError:  # The file system has no locks.
            return False


def _remove_leftovers(folder: Path, name: str, sources: str) -> None:
    """Remove the leftovers of killed builds, other versions' libraries and damaged ones.

    A process that has waited too long for this folder builds without its lock, and holds that of the one it builds in.
    """
    for path in folder.iterdir():
        if path.is_dir() and path.name.startswith((_SCRATCH, _OLD_SCRATCH)):
            with suppress(FileNotFoundError), _locked(path, patience=0) as is_left:
                if is_left:
                    shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(_PREFIX) and not _is_of(path.name, name, sources):
            path.unlink(missing_ok=True)


def _is_of(file: str, name: str, sources: str) -> bool:
    """Return whether a file is a library of these sources for another machine."""
    return file.startswith(f"{_PREFIX}{sources}-") and not file.startswith(f"{name}-")
