"""Locks on folders, which the system releases when their process ends, however it ends."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import FolderInUseError


class FolderLock:
    """Lock that keeps other processes out of a folder until `release`, or until this process ends.

    Args:
        file: file of the lock, within the folder; made where it is missing, and never removed.
        advice: sentence for the message of the error.

    Raises:
        FolderInUseError: another process holds the lock; the message names it and its machine.
    """

    def __init__(self, file: Path, advice: str) -> None:
        self._lock = FileLock(file)
        owner = file.with_name(f"{file.name}-owner")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            by = owner.read_text(encoding="utf-8", errors="replace").strip() if owner.is_file() else ""
            raise FolderInUseError(f"{file.parent} is in use by {by or 'another process'}. {advice}") from error
        owner.unlink(missing_ok=True)  # It may be a link to a file elsewhere.
        owner.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")

    def release(self) -> None:
        """Release the lock, so that other processes may use the folder."""
        self._lock.release()
