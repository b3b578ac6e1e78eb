"""Loads the compiled loops: those that a wheel brings, else those that the machine's own C compiler makes, once."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from ..utils.private_names import TORCH_EXTENSION
from . import targets
from .arguments import (
    ARGUMENTS,
    AffineArguments,
    Arguments,
    AttentionArguments,
    BlockArguments,
    DecodeArguments,
    DecodeBlockedArguments,
    GegluArguments,
    GroupNormArguments,
    ProductArguments,
    QuantizeArguments,
    RangeArguments,
    RepackArguments,
    RescaleArguments,
    TokenArguments,
)
from .cache import kept_library
from .compiler import COMMON_FLAGS, SOURCES, BuildError, build, compilers, digest, machine_digest
from .dense_form import DENSE_FORMS

logger = logging.getLogger(__name__)

_SOURCES = SOURCES
_FLAGS = (*COMMON_FLAGS, "-march=native")

# Values of a loop below which another thread costs more than it saves.
_VALUES_PER_THREAD = 1 << 14

# Numbers of dtypes in the loops; decoding to int8 gives the codes of weights.
NATIVE_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}

# Columns of rows that are compared with the library's: whole groups of words of the dense form, and parts.
_COMPARED_COLUMNS = (1, 2, 24, 25, 301)

ArgumentsT = TypeVar("ArgumentsT", bound=Arguments)


@dataclass(frozen=True)
class Loop(Generic[ArgumentsT]):
    """A compiled loop over rows."""

    _address: int | None
    _run: Callable[..., None]
    _parallel: int | None

    def __call__(self, rows: int, columns: int, arguments: ArgumentsT, per_thread: int = _VALUES_PER_THREAD) -> None:
        """Process `rows` on the threads that torch computes with; the interpreter's lock is released meanwhile.

        Args:
            rows: their number.
            columns: values of a row.
            arguments: the struct beside the loop in C.
            per_thread: values that are worth a thread.

        Raises:
            MemoryError: there is none for the loop to work in.
        """
        threads = torch.get_num_threads() if self._parallel and rows * columns >= 2 * per_thread else 1
        self._run(self._parallel, self._address, ctypes.addressof(arguments), rows, threads)
        if arguments.failed:
            raise MemoryError("There is not enough memory to work in.")


@dataclass(frozen=True)
class NativeLibrary:
    """The compiled loops; what each does stands beside it in C."""

    decode: Loop[DecodeArguments]
    quantize: Loop[QuantizeArguments]
    repack: Loop[RepackArguments]
    quantize_tokens: Loop[TokenArguments]
    range: Loop[RangeArguments]
    quantize_affine: Loop[AffineArguments]
    rescale: Loop[RescaleArguments]
    rescale_geglu: Loop[RescaleArguments]
    geglu: Loop[GegluArguments]
    group_norm: Loop[GroupNormArguments]
    group_moments: Loop[GroupNormArguments]
    group_norm_channels_last: Loop[GroupNormArguments]
    block_weight: Loop[BlockArguments]
    decode_blocked: Loop[DecodeBlockedArguments]
    multiply: Loop[ProductArguments] | None  # It is None without AVX2.
    panel_positions: int  # This is the number of positions of a panel of `multiply`.
    attention: Loop[AttentionArguments] | None  # It is None without AVX-512 BF16.
    attention_queries: int  # This is the number of queries of a row of `attention`.


@functools.cache
def native_library() -> NativeLibrary | None:
    """Return the compiled functions, or None where they can neither be found nor built, which is logged once."""
    try:
        return _bound(_prebuilt() or _built())
    except (BuildError, OSError) as error:
        logger.warning("The compiled loops are missing, and slower ones of torch run in their place: %s", error)
        return None


def _prebuilt() -> ctypes.CDLL | None:
    """Return the wheel's library for this processor, None where the package brings none of these sources."""
    names = list(targets.targets())
    baseline = targets.prebuilt_library(targets.PREBUILT, names[0]) if names else None
    if baseline is None:
        return None
    try:
        best = targets.prebuilt_library(targets.PREBUILT, names[_loaded(baseline).bitsfusion_target()])
        return None if best is None else _loaded(best)
    except OSError as error:
        logger.info("A library of the package is not used: %s", error)
        return None


def _built() -> ctypes.CDLL:
    """Return the library that a compiler of this machine builds, or built before.

    Raises:
        BuildError: no compiler can.
        OSError: there is no place to build in, or the result cannot be loaded.
    """
    if not compilers():
        raise BuildError("there is no C compiler (cc, gcc, clang, or what CC names)")
    make = functools.partial(build, _SOURCES, _FLAGS)
    with kept_library(digest(_SOURCES), machine_digest(_FLAGS), make) as path:
        return _loaded(path)


def _loaded(path: Path) -> ctypes.CDLL:
    """Load the library at a path.

    Raises:
        OSError: it cannot be loaded, or its sources or sizes are not those of this package.
    """
    library = ctypes.CDLL(str(path))
    try:
        library.bitsfusion_sources.restype = ctypes.c_char_p
        if library.bitsfusion_sources().decode() != digest(_SOURCES):
            raise OSError(f"{path} is made of other sources")
        _compare_sizes(library)
    except AttributeError as error:
        raise OSError(f"{path} is no library of this package") from error
    return library


def _compare_sizes(library: ctypes.CDLL) -> None:
    """Refuse a library whose structs of arguments, or rows of the dense form, have other sizes than in Python.

    Raises:
        OSError: a size differs.
    """
    for name in _loops_of(library):
        size = library[f"bitsfusion_{name}_size"]
        size.restype = ctypes.c_int64
        if size() != ctypes.sizeof(ARGUMENTS[name]):
            raise OSError(f"the loop {name} expects {size()} bytes, not {ctypes.sizeof(ARGUMENTS[name])}")
    row_bytes = library.bitsfusion_row_bytes
    row_bytes.argtypes, row_bytes.restype = (ctypes.c_int64, ctypes.c_int), ctypes.c_int64
    for bits, form in DENSE_FORMS.items():
        for columns in _COMPARED_COLUMNS:
            if row_bytes(columns, bits) != form.row_bytes(columns):
                raise OSError(f"{columns} codes of {bits} bits take {row_bytes(columns, bits)} bytes in the library")


def _loops_of(library: ctypes.CDLL) -> list[str]:
    """Return the loops that the library has for the instructions that it was compiled for."""
    missing = set() if library.bitsfusion_panel_positions() else {"multiply"}
    missing |= set() if library.bitsfusion_attention_queries() else {"attention"}
    return [name for name in ARGUMENTS if name not in missing]


def _bound(library: ctypes.CDLL) -> NativeLibrary:
    run = library.bitsfusion_run
    run.argtypes = (*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int)
    run.restype = None
    parallel = _parallel()
    loops: dict[str, Any] = dict.fromkeys(ARGUMENTS)
    for name in _loops_of(library):
        loops[name] = Loop(_address_of(library[f"bitsfusion_{name}"]), run, parallel)
    return NativeLibrary(
        **loops,
        panel_positions=library.bitsfusion_panel_positions(),
        attention_queries=library.bitsfusion_attention_queries(),
    )


def _parallel() -> int | None:
    """Return the address of GOMP_parallel, by which OpenMP runs compiled code on threads; None without it.

    It is looked for in what torch is linked with, so that torch's runtime is found and not another library's.
    """
    extension = getattr(TORCH_EXTENSION.read(torch), "__file__", None)
    if extension is None:
        logger.warning("Compiled loops run on one thread: %s", TORCH_EXTENSION.missing())
        return None
    return _address_of(getattr(ctypes.CDLL(extension), "GOMP_parallel", None))


def _address_of(function: Any) -> int | None:
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value
