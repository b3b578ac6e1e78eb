"""The instruction sets that a wheel's libraries are compiled for, and the one that this processor supports.

A wheel may bring libraries in `prebuilt/`, which `build.py` writes: one for each target of its platform. The first
target of a platform is its baseline, whose library says which one the processor supports, since no name of
instructions is the same on all systems.
"""

from __future__ import annotations

import platform
from pathlib import Path

from .cache import DIGEST_LENGTH, SUFFIX, is_whole

PREBUILT = Path(__file__).parent / "prebuilt"

_AVX512 = ("-mavx512vbmi", "-mavx512vnni")

# Compiler flags by target, in the order of `bitsfusion_target` in handshake.c.
_X86_64 = {
    "x86-64-v2": ("-march=x86-64-v2",),
    "x86-64-v3": ("-march=x86-64-v3",),  # This level has AVX2.
    "x86-64-v4": ("-march=x86-64-v4",),  # This level has AVX-512.
    "x86-64-v4-vbmi": ("-march=x86-64-v4", *_AVX512),
    "x86-64-v4-bf16": ("-march=x86-64-v4", *_AVX512, "-mavx512bf16"),
}
_AARCH64 = {"aarch64": ()}


def targets() -> dict[str, tuple[str, ...]]:
    """Return the targets of this kind of processor with their compiler flags, the baseline first; empty for others."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return dict(_X86_64)
    return dict(_AARCH64) if machine in ("aarch64", "arm64") else {}


def prebuilt_library(folder: Path, target: str) -> Path | None:
    """Return a target's library in `folder` if that is whole, None where it is missing or damaged."""
    pattern = f"{file_stem(target)}-{'[0-9a-f]' * DIGEST_LENGTH}{SUFFIX}"
    return next(filter(is_whole, folder.glob(pattern)), None)


def file_stem(target: str) -> str:
    """Return the name of a target's library without the digest of its content."""
    return f"bitsfusion-{target}"
