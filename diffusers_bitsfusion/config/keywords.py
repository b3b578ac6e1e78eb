"""Keywords that `BitsFusionConfig` does not have, as other methods call them or misspelt: what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ..utils.errors import printable

# Parts of other methods' names for the bits of all weights, and for the modules to leave alone.
_BITS = ("bit", "qtype", "weights_dtype", "quant_type")
_LEFT_ALONE = ("skip", "exclude", "ignore", "not_convert")


def what_to_write(unknown: Mapping[str, Any], known: Iterable[str]) -> str:
    """Return what a user may have meant by keywords that are not there, as sentences.

    Args:
        unknown: the keywords with their values.
        known: the keywords that there are.
    """
    known = list(known)
    sentences = []
    for name, value in unknown.items():
        # A misspelt name is nearer to the right one than the names of other methods are.
        if near := difflib.get_close_matches(name, known, n=2, cutoff=0.85):
            sentences.append(f"{printable(name)}: did you mean {' or '.join(near)}?")
        elif any(part in name for part in _LEFT_ALONE):
            sentences.append(f"{printable(name)}: modules to leave alone are modules_to_not_convert=[names].")
        elif any(part in name for part in _BITS):
            bits = value if type(value) is int and 1 <= value <= 8 else 2
            sentences.append(
                f"{printable(name)}: {bits} bits in every layer are BitsFusionConfig(recipe={bits}), an average of "
                f"{bits} bits a weight target_bits={bits}, bits of layers by name recipe={{name: bits}}."
            )
        elif near := difflib.get_close_matches(name, known, n=2):
            sentences.append(f"{printable(name)}: did you mean {' or '.join(near)}?")
    return " ".join([*sentences, f"Known are: {', '.join(known)}."])
