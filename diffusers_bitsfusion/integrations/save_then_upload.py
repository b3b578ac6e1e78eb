"""Saving into a folder all or nothing, then uploading: the steps that models and pipelines share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from ..utils.safetensors_files import sort_metadata
from .folder_commit import private_folder, replacing

# True while a pipeline is being saved: its one card replaces those of its models.
inside_pipeline: ContextVar[bool] = ContextVar("inside_pipeline", default=False)

# Uploads that wait until the current save is complete; None outside a save.
_uploads: ContextVar[list[Callable[[str], Any]] | None] = ContextVar("uploads", default=None)

# Name of the folder, within a private one, of hard links to the saved files.
_LINKS = "links"


@contextmanager
def replacing_then_uploading(directory: Path) -> Iterator[Path]:
    """Give a folder to save into as `folder_commit.replacing`; the block's uploads come after the finished save.

    A push that fails thus leaves the finished save.

    Args:
        directory: folder whose files are replaced, made where it is missing.

    Raises:
        OSError: the disk is full, or the folder cannot be written; its earlier files are kept.
    """
    uploads: list[Callable[[str], Any]] = []
    token = _uploads.set(uploads)
    try:
        with replacing(directory) as scratch:
            yield scratch
            for file in scratch.rglob("*.safetensors"):
                sort_metadata(file)  # Equal models give equal bytes.
            names = [file.relative_to(scratch) for file in scratch.rglob("*") if file.is_file()]
    finally:
        _uploads.reset(token)
    if not uploads:
        return
    with private_folder(directory) as linked:
        for name in names:
            (linked / _LINKS / name).parent.mkdir(parents=True, exist_ok=True)
            _link(directory / name, linked / _LINKS / name)
        for upload in uploads:
            upload(str(linked / _LINKS))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # Some file systems have no hard links.
        shutil.copyfile(source, target)


def upload_or_defer(upload: Callable[[str], Any], folder: str | os.PathLike[str]) -> Any:
    """Upload a folder now or, within a save, after it.

    Args:
        upload: function that uploads the folder of the given path.
        folder: folder to upload.

    Returns:
        Result of `upload`; None where it is deferred.
    """
    uploads = _uploads.get()
    if uploads is None:
        return upload(str(folder))
    uploads.append(upload)
    return None


def save_even_if_refused(save: Callable[..., Any], scratch: Path, push_to_hub: bool) -> Exception | None:
    """Call `save(push_to_hub=...)`; where the Hub refuses before anything is written, save without a push.

    Args:
        save: function that saves into `scratch`.
        scratch: empty folder.
        push_to_hub: whether to push.

    Returns:
        Refusal of the Hub, to be raised when the save is complete; or None.

    Raises:
        OSError: the folder cannot be written.
    """
    try:
        save(push_to_hub=push_to_hub)
    except (OSError, HfHubHTTPError) as error:
        if not push_to_hub or any(scratch.iterdir()):
            raise
        save(push_to_hub=False)
        return error
    return None


def folder_title(folder: Path) -> str:
    """Return the title of a card for a folder: its name."""
    return folder.resolve().name
