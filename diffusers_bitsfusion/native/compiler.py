"""The C compilers of the machine, and the options that they are given.

This file needs the standard library only, so that `build.py` runs without torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.[ch]")))

# Compiler flags. Sums may be reordered, or they would not vectorise; all else is IEEE arithmetic, and no start-up code
# is linked that would change the process's floating-point state, as -ffast-math does.
COMMON_FLAGS = (
    "-O3", "-std=c11", "-shared",
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=off",
)  # fmt: skip
# Flags that Windows lacks, which has neither position-independent code nor a separate library for mathematics.
_PLATFORM_FLAGS, _LINKED = ((), ()) if os.name == "nt" else (("-fPIC",), ("-lm",))

# Seconds after which a compiler is taken to hang; a slow machine needs some 30.
_TIMEOUT = 300


class BuildError(Exception):
    """No compiler gives a library; the message says why, in one line."""


def compilers() -> list[list[str]]:
    """Return the commands of the compilers that there are, the one that the variable CC names first."""
    try:
        named = shlex.split(os.environ.get("CC", ""), posix=os.name != "nt")
    except ValueError:  # A quotation in CC does not end.
        named = []
    found: list[list[str]] = []
    for program, *arguments in filter(None, (named, ["cc"], ["gcc"], ["clang"])):
        path = shutil.which(program)
        if path is not None and [path, *arguments] not in found:
            found.append([path, *arguments])
    return found


def build(sources: Sequence[Path], flags: Sequence[str], library: Path) -> None:
    """Compile the C files of `sources` to `library` by the first compiler that can.

    Raises:
        BuildError: none can.
    """
    files = [str(source) for source in sources if source.suffix == ".c"]
    arguments = [*_PLATFORM_FLAGS, *flags, f'-DBITSFUSION_SOURCES="{digest(sources)}"', *files, "-o", str(library)]
    failures = []
    for command in compilers():
        failure = _run([*command, *arguments, *_LINKED])
        if failure is None and library.is_file():
            return
        failures.append(f"{Path(command[0]).name} says: {failure or 'nothing, and gives no library'}")
    raise BuildError("; ".join(failures) or "there is no C compiler")


def _run(command: list[str]) -> str | None:
    """Run a compiler; what it says where it fails, in one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines
    return telling[0] if telling else f"nothing, with exit status {done.returncode}"


def digest(sources: Sequence[Path]) -> str:
    """Return what tells one version of the sources from another."""
    texts = [source.read_text(encoding="utf-8") for source in sources]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def machine_digest(flags: Sequence[str]) -> str:
    """Return what tells libraries of the same sources apart, in a cache that several machines may share."""
    parts = [*flags, platform.system(), platform.machine(), _cpu_name()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu_name() -> str:
    """Return what `-march=native` depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor()
