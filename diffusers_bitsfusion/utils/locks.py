"""Locks on files, which the system gives back when their process ends, however it ends."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import FolderInUseError


class FolderLock:
    """Keeps other processes out of a folder until `release`, or until this process ends.

    Args:
        file: the lock, within the folder; made where it is missing, and left there.
        advice: what who meets a held lock should do.

    Raises:
        FolderInUseError: another process holds it; the message says which, and where.
    """

    def __init__(self, file: Path, advice: str):
        self._lock = FileLock(file)
        owner = file.with_name(f"{file.name}-owner")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            by = owner.read_text(encoding="utf-8", errors="replace").strip() if owner.is_file() else ""
            raise FolderInUseError(f"{file.parent} is in use by {by or 'another process'}. {advice}") from error
        owner.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")

    def release(self) -> None:
        """Let others in."""
        self._lock.release()
