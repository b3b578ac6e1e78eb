"""Compiles `native.c` with the machine's own C compiler, once, and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("native.c")

# Sums may be reordered (they vectorise only so); nothing else of IEEE arithmetic is given up, and no start-up code is
# linked that would change the process's floating-point state, as -ffast-math does.
_FLAGS = (
    "-O3", "-march=native", "-std=c11", "-shared", "-fPIC",
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math",
)  # fmt: skip

# Below this many weights a thread costs more than it saves.
_WEIGHTS_PER_THREAD = 1 << 17


@dataclass(frozen=True)
class NativeLibrary:
    """The compiled functions; arguments as in `native.c`."""

    decode: Callable[..., None]
    quantize: Callable[..., None]


@functools.cache
def native_library() -> NativeLibrary | None:
    """The compiled functions, or None on a machine that has no C compiler or cannot keep its result."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.CalledProcessError):
        return None
    pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    decode, quantize = library.bitsfusion_decode, library.bitsfusion_quantize
    decode.argtypes = [pointer] * 3 + [size] * 3 + [integer] * 2
    quantize.argtypes = [pointer] * 4 + [size] * 3 + [integer] * 3 + [ctypes.c_float, integer, integer]
    decode.restype = quantize.restype = None
    return NativeLibrary(decode, quantize)


def _build(compiler: str) -> Path:
    key = hashlib.sha256("\0".join([_SOURCE.read_text(), *_FLAGS, platform.machine(), _cpu_name()]).encode())
    library = _cache_dir() / f"native-{key.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch) / library.name
            subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(built), "-lm"], check=True, capture_output=True)
            built.replace(library)  # atomic: processes that build at the same time do not see half a file
    return library


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "diffusers_bitsfusion"


def _cpu_name() -> str:
    """What `-march=native` depends on: a cache shared by several machines must not mix them."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor()


def for_row_ranges(function: Callable[[int, int], None], rows: int, columns: int) -> None:
    """Call `function(start, stop)` for ranges that cover `rows`, on as many threads as torch uses.

    The compiled functions release the interpreter's lock while they run.
    """
    threads = max(1, min(torch.get_num_threads(), rows * columns // _WEIGHTS_PER_THREAD, rows))
    step = max(1, -(-rows // threads))
    others = [_pool(os.getpid()).submit(function, start, min(start + step, rows)) for start in range(step, rows, step)]
    function(0, min(step, rows))
    for other in others:
        other.result()


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Workers of this process; threads do not survive a fork, so a child makes its own."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="bitsfusion")
