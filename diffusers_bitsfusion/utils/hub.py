"""Folders that may be on the Hub, and what to do about a Hub that refuses an upload."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

_WAYS_OUT = {
    401: "Log in with `hf auth login`, or pass `token=`.",
    403: "The token may not write there: make one with write access at https://huggingface.co/settings/tokens.",
    429: "Too many requests: wait a few minutes, then push again. Files that arrived are not sent twice.",
}
_SERVER_TROUBLE = "The Hub has trouble: push again later. Files that arrived are not sent twice."


def local_folder(path: str | os.PathLike[str], patterns: Sequence[str]) -> Path:
    """A folder as it is, or the folder that those files of a Hub id which match `patterns` are downloaded into.

    Raises:
        FileNotFoundError: it is neither a folder nor a Hub id.
        OSError: the Hub has no such repository, or cannot be asked.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(os.fspath(path), allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise FileNotFoundError(f"{path} is neither a folder nor a Hub id.") from error


_MARK = "Nothing was committed to"


@contextmanager
def explaining_refusals(repo_id: str) -> Iterator[None]:
    """Add to the client's error what state the repository is in and what to do; once, where such blocks are nested.

    Raises:
        HfHubHTTPError: the client's own, its message extended.
    """
    try:
        yield
    except HfHubHTTPError as error:
        if _MARK not in str(error):
            status = error.response.status_code
            way_out = _WAYS_OUT.get(status, _SERVER_TROUBLE if status >= 500 else "")
            error.append_to_message(f"\n{_MARK} {repo_id}. {way_out}".rstrip())
        raise
