"""Folders that may be on the Hub, and advice for uploads that the Hub refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

# Advice by HTTP status of a refusal.
_ADVICE = {
    401: "Log in with `hf auth login`, or pass `token=`.",
    403: "The token may not write there: make one with write access at https://huggingface.co/settings/tokens.",
    429: "Too many requests: wait a few minutes, then push again. Files that arrived are not sent twice.",
}
# Advice for a status from 500.
_SERVER_ADVICE = "The Hub has trouble: push again later. Files that arrived are not sent twice."


def local_folder(path: str | os.PathLike[str], patterns: Sequence[str]) -> Path:
    """Return a folder, or the local copy of those files of a Hub id that match `patterns`.

    Args:
        path: folder or Hub id ("user/name").
        patterns: shell patterns of the files to download.

    Raises:
        FileNotFoundError: `path` is neither a folder nor a Hub id.
        OSError: the Hub has no such repository, or cannot be reached.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(os.fspath(path), allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise FileNotFoundError(f"{path} is neither a folder nor a Hub id.") from error


# Words by which a message that has been extended already is recognised.
_MARK = "Nothing was committed to"


@contextmanager
def explaining_refusals(repo_id: str) -> Iterator[None]:
    """Extend an error of the Hub client by the state of the repository and advice; once, where blocks are nested.

    Args:
        repo_id: repository that is pushed to, for the message.

    Raises:
        HfHubHTTPError: the error of the client, with the extended message.
    """
    try:
        yield
    except HfHubHTTPError as error:
        if _MARK not in str(error):
            status = error.response.status_code
            advice = _ADVICE.get(status, _SERVER_ADVICE if status >= 500 else "")
            error.append_to_message(f"\n{_MARK} {repo_id}. {advice}".rstrip())
        raise
