"""What to do about a Hub that refuses an upload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError

_WAYS_OUT = {
    401: "Log in with `hf auth login`, or pass `token=`.",
    403: "The token may not write there: make one with write access at https://huggingface.co/settings/tokens.",
    429: "Too many requests: wait a few minutes, then push again. Files that arrived are not sent twice.",
}
_SERVER_TROUBLE = "The Hub has trouble: push again later. Files that arrived are not sent twice."


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
