"""Compiles the loops of `kernels/` with the machine's own C compiler, once, and loads them."""

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

_SOURCES = sorted(Path(__file__).with_name("kernels").glob("*.[ch]"))

# Sums may be reordered (they vectorise only so); nothing else of IEEE arithmetic is given up, and no start-up code is
# linked that would change the process's floating-point state, as -ffast-math does.
_FLAGS = (
    "-O3", "-march=native", "-std=c11", "-shared", "-fPIC",
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=off",
)  # fmt: skip

# Below this many values a thread costs more than it saves, where loops compute with each: it takes some 50
# microseconds to begin.
_VALUES_PER_THREAD = 1 << 17


# The codes that the loops have for dtypes; decoding to int8 gives the codes of weights.
NATIVE_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}


@dataclass(frozen=True)
class NativeLibrary:
    """The compiled functions; arguments as in `kernels/`."""

    decode: Callable[..., None]
    quantize: Callable[..., None]
    quantize_tokens: Callable[..., None]
    range: Callable[..., None]
    quantize_affine: Callable[..., None]
    rescale: Callable[..., None]
    rescale_geglu: Callable[..., None]
    block_weight: Callable[..., None]
    multiply: Callable[..., None] | None  # where the processor has AVX2
    attention: Callable[..., None]
    attention_queries: int  # that a unit of `attention`'s work has; 0 where the processor lacks the instructions


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
    pointer, size, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float

    def function(name: str, *arguments: type) -> Callable[..., None]:
        found = library[f"bitsfusion_{name}"]
        found.argtypes, found.restype = arguments, None
        return found

    multiply = function("multiply", *[pointer] * 3, *[size] * 3, integer)
    return NativeLibrary(
        decode=function("decode", *[pointer] * 3, *[size] * 3, integer, integer),
        quantize=function("quantize", *[pointer] * 4, *[size] * 3, *[integer] * 3, real, integer, integer),
        quantize_tokens=function("quantize_tokens", *[pointer] * 3, size, size, integer),
        range=function("range", pointer, pointer, size, size, integer),
        quantize_affine=function("quantize_affine", *[pointer] * 4, size, size, integer),
        rescale=function("rescale", *[pointer] * 5, size, size, integer),
        rescale_geglu=function("rescale_geglu", *[pointer] * 5, size, size, integer),
        block_weight=function("block_weight", *[pointer] * 2, *[size] * 6),
        multiply=multiply if library.bitsfusion_multiplies() else None,
        attention=function("attention", *[pointer] * 5, *[size] * 4, real, size, size, integer),
        attention_queries=library.bitsfusion_attention_queries(),
    )


def _build(compiler: str) -> Path:
    texts = [source.read_text(encoding="utf-8") for source in _SOURCES]
    key = hashlib.sha256("\0".join([*texts, *_FLAGS, platform.machine(), _cpu_name()]).encode())
    library = _cache_dir() / f"native-{key.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch) / library.name
            sources = [str(source) for source in _SOURCES if source.suffix == ".c"]
            subprocess.run([compiler, *_FLAGS, *sources, "-o", str(built), "-lm"], check=True, capture_output=True)
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


def for_row_ranges(
    function: Callable[[int, int], None], rows: int, columns: int, per_thread: int = _VALUES_PER_THREAD
) -> None:
    """Call `function(start, stop)` for ranges that cover `rows`, on as many threads as torch uses.

    The compiled functions release the interpreter's lock while they run.

    Args:
        function: of the first row of a range, and the one after its last.
        rows: their number.
        columns: values of a row.
        per_thread: values that are worth a thread.
    """
    threads = max(1, min(torch.get_num_threads(), rows * columns // per_thread, rows))
    step = max(1, -(-rows // threads))
    others = [_pool(os.getpid()).submit(function, start, min(start + step, rows)) for start in range(step, rows, step)]
    function(0, min(step, rows))
    for other in others:
        other.result()


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Workers of this process; threads do not survive a fork, so a child makes its own."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="bitsfusion")
