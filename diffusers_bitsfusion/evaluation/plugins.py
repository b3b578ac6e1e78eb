"""Functions that users write, named MODULE:FUNCTION."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def load_function(name: str, what: str) -> Callable[..., Any]:
    """Return the function that `name` stands for; modules in the working directory are found.

    Args:
        name: written MODULE:FUNCTION.
        what: its part, for the errors.

    Raises:
        ValueError: no such module or function, or `name` is not written so.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"The {what} {name!r} is not written MODULE:FUNCTION.")
    # An installed command, or a script in another folder, lacks the working directory, where a plug-in usually lies.
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ValueError(f"The {what} {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"The module {module} has no function {function!r}.")
    return found


def is_function(name: str) -> bool:
    """Return whether a name is written MODULE:FUNCTION, rather than being a folder or Hub id of a model."""
    return ":" in name and not os.path.exists(name)
