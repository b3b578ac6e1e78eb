"""Time and peak memory of work done in a fresh process, and control of the page cache under it.

Peak memory is the resident high-water mark that the child reads of itself, file-backed pages included. It is
not `ru_maxrss`, which on Linux a child inherits from its parent across fork and exec: measured from a parent that
holds a model, every child would seem to need at least as much.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
READ_SIZE = 16 * 2**20


class ChildFailed(RuntimeError):
    """A measured process ended with an error; the message holds the end of what it wrote to stderr."""


def peak_rss() -> int:
    """Bytes of the resident high-water mark of this process."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measured_call(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call `function` and add to its result the seconds it took and this process's peak memory.

    `cpu_seconds` is the time of all its threads and ended children, steadier than `seconds` on a busy machine.
    `peak_over_imports` counts from the high-water mark at the call, so everything the function imports should be
    imported before.
    """
    imports_rss = peak_rss()
    cpu_start, start = sum(os.times()[:4]), time.perf_counter()
    result = function(*arguments)
    seconds, cpu_seconds = time.perf_counter() - start, sum(os.times()[:4]) - cpu_start
    peak = peak_rss()
    measured = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_rss": peak,
        "peak_over_imports": peak - imports_rss,
    }
    return {**result, **measured}


def run_child(arguments: Sequence[str], python: str = sys.executable) -> dict[str, Any]:
    """Run `python *arguments` at the root of the repository and return the JSON object on its last line of output,
    with `process_seconds`, the wall time of the whole process, added."""
    start = time.perf_counter()
    child = subprocess.run([python, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if child.returncode:
        raise ChildFailed(f"{' '.join(arguments)} ended with {child.returncode}:\n{child.stderr[-2000:]}")
    return {**json.loads(child.stdout.splitlines()[-1]), "process_seconds": seconds}


def run_snippet(code: str, imports: str = "", python: str = sys.executable) -> dict[str, Any]:
    """Run `code` in a fresh process and measure it; `imports` runs before and counts as the bare process.

    What `code` assigns to the dictionary `result` comes back beside the measurements.
    """
    program = (
        "import json\n"
        "from benchmarks.measure import measured_call\n"
        "scope = {'result': {}}\n"
        f"exec({imports!r}, scope)\n"
        "def call():\n"
        f"    exec({code!r}, scope)\n"
        "    return scope['result']\n"
        "print(json.dumps(measured_call(call)))\n"
    )
    return run_child(["-c", program], python)


def is_installed(module: str, python: str = sys.executable) -> bool:
    """Whether the interpreter `python` finds the top-level package of `module`."""
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module.split('.')[0]!r}) is None)"
    return subprocess.run([python, "-c", probe], cwd=REPOSITORY).returncode == 0


def warm_page_cache(path: str | os.PathLike[str]) -> None:
    """Read every file at or under `path`, so that the next reader finds it in memory."""
    for file in _files(path):
        with file.open("rb", buffering=0) as stream:
            while stream.read(READ_SIZE):
                pass


def drop_page_cache(path: str | os.PathLike[str]) -> None:
    """Write back and evict every file at or under `path`, so that the next reader goes to the disk.

    The kernel keeps pages that another process maps, and a virtual machine's host may hold a cache of its own.
    """
    for file in _files(path):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(path: str | os.PathLike[str]) -> Iterator[Path]:
    path = Path(path)
    return iter([path]) if path.is_file() else (file for file in path.rglob("*") if file.is_file())
