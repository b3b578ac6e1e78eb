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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))

# Sums may be reordered (they vectorise only so); nothing else of IEEE arithmetic is given up, and no start-up code is
# linked that would change the process's floating-point state, as -ffast-math does.
_FLAGS = (
    "-O3", "-march=native", "-std=c11", "-shared", "-fPIC",
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=off",
)  # fmt: skip

# Below this many values a thread costs more than it saves, where loops compute with each.
_VALUES_PER_THREAD = 1 << 14

# The codes that the loops have for dtypes; decoding to int8 gives the codes of weights.
NATIVE_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}


@dataclass(frozen=True)
class Loop:
    """A compiled loop over rows."""

    _address: int | None
    _run: Callable[..., None]
    _parallel: int | None

    def __call__(self, rows: int, columns: int, *arguments: int, per_thread: int = _VALUES_PER_THREAD) -> None:
        """Go over `rows`, on the threads that torch computes with; the interpreter's lock is released meanwhile.

        Args:
            rows: their number.
            columns: values of a row.
            arguments: addresses and integers, in the order of the struct beside the loop in `kernels/`.
            per_thread: values that are worth a thread.

        Raises:
            MemoryError: there is none for the loop to work in.
        """
        threads = torch.get_num_threads() if self._parallel and rows * columns >= 2 * per_thread else 1
        failed = ctypes.c_int32()
        words = (ctypes.c_int64 * (len(arguments) + 1))(*arguments, ctypes.addressof(failed))
        self._run(self._parallel, self._address, words, rows, threads)
        if failed.value:
            raise MemoryError("There is not enough memory to work in.")


@dataclass(frozen=True)
class NativeLibrary:
    """The compiled loops; what each does stands in `kernels/`."""

    decode: Loop
    quantize: Loop
    repack: Loop
    quantize_tokens: Loop
    range: Loop
    quantize_affine: Loop
    rescale: Loop
    rescale_geglu: Loop
    block_weight: Loop
    multiply: Loop | None  # where the processor has AVX2
    attention: Loop
    attention_queries: int  # that a row of `attention` has; 0 where the processor lacks the instructions


@functools.cache
def native_library() -> NativeLibrary | None:
    """The compiled functions, or None on a machine that has no C compiler or cannot keep its result."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, RuntimeError, subprocess.CalledProcessError):  # the second: no home folder
        return None
    run = library.bitsfusion_run
    run.argtypes = (*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int)
    run.restype = None
    # Looked for in what torch is linked with, so that its OpenMP runtime is found and not another library's.
    parallel = _address_of(getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None))

    def loop(name: str) -> Loop:
        return Loop(_address_of(library[f"bitsfusion_{name}"]), run, parallel)

    return NativeLibrary(
        decode=loop("decode"),
        quantize=loop("quantize"),
        repack=loop("repack"),
        quantize_tokens=loop("quantize_tokens"),
        range=loop("range"),
        quantize_affine=loop("quantize_affine"),
        rescale=loop("rescale"),
        rescale_geglu=loop("rescale_geglu"),
        block_weight=loop("block_weight"),
        multiply=loop("multiply") if library.bitsfusion_multiplies() else None,
        attention=loop("attention"),
        attention_queries=library.bitsfusion_attention_queries(),
    )


def _address_of(function: Any) -> int | None:
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


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
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusers_bitsfusion"


def _cpu_name() -> str:
    """What `-march=native` depends on: a cache shared by several machines must not mix them."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor()
