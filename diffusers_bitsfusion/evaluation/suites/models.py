"""Models that suites need, loaded with errors that say what to download and where from."""

from __future__ import annotations

import os
from typing import Any


def load_model(kind: Any, path: str | os.PathLike[str], what: str, option: str) -> Any:
    """Return `kind.from_pretrained(path)`.

    Args:
        kind: a class of transformers, or one with the same method.
        path: folder or Hub id.
        what: the model's part in the suite, for the error.
        option: of the command line, that names another model, for the error.

    Raises:
        OSError: there is no such model, or the Hub cannot be reached.
        ValueError: another kind of model.
    """
    path = os.fspath(path)
    try:
        return kind.from_pretrained(path)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise OSError(
            f"{what[0].upper()}{what[1:]}, {path}, cannot be loaded ({first}). Where there is a network, download it "
            f"from https://huggingface.co/{path} by `hf download {path}`, or give the folder of a model with {option}."
        ) from error
