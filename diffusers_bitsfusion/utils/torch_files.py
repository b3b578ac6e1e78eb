"""Reader of torch's .pt files: tensors and plain values only, every byte checked, on the CPU."""

from __future__ import annotations

import math
import os
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import DamagedFileError, printable

# What pickles of tensors, plain values, and of numpy's and Python's states of generators name.
_CALLS = {
    "_codecs.encode",
    "collections.OrderedDict",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
}
# Values that a file holds at most: an optimizer of 10,000 parameters has 50,000.
_MAX_VALUES = 10_000_000

# Storages and dtypes of torch.
_TORCH_NAME = re.compile(r"torch\.(\w+Storage|b?float\d+\w*|u?int\d+|bool|half|double|long|Size)")


def read_torch(file: str | os.PathLike[str], remedy: str, mmap: bool = False) -> Any:
    """Read a file of `torch.save`, wherever it was written, onto the CPU.

    The archive's own checksums are compared first, since torch does not compare them.

    Args:
        file: file to read.
        remedy: sentence for the message of the error.
        mmap: whether tensors are mapped from the file rather than copied.

    Raises:
        DamagedFileError: the file is cut short or changed, or holds anything but tensors and plain values.
        FileNotFoundError: there is no such file.
    """
    check_archive(file, remedy)
    try:
        content = torch.load(file, weights_only=True, map_location="cpu", mmap=mmap)
    except FileNotFoundError:
        raise
    except Exception as error:  # An unpickler raises many kinds of exceptions for bytes that are no pickle.
        raise DamagedFileError(file, f"is damaged ({_first_line(error)})", remedy) from error
    if not all(map(_is_dense, tensors_of(content))):
        raise DamagedFileError(file, "is damaged: a tensor in it is larger than its data", remedy)
    if not _is_a_tree(content):
        raise DamagedFileError(file, "is damaged: a list or dict in it holds itself, or is there too often", remedy)
    return content


def check_archive(file: str | os.PathLike[str], remedy: str) -> None:
    """Compare every record of a file of `torch.save` with its checksum, and what it would call with what it may.

    Raises:
        DamagedFileError: a record differs, the file is no archive, or it calls more than what makes tensors and plain
            values.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if len(set(names)) < len(names):
                raise zipfile.BadZipFile("a record is there twice")
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise zipfile.BadZipFile("a record is compressed, which torch never does")
            if sum(record.file_size for record in records) > os.path.getsize(file):
                raise zipfile.BadZipFile("records have the same bytes")
            wrong = archive.testzip()
            for name in names if wrong is None else ():
                if name.endswith("/data.pkl"):
                    _refuse_other_calls(archive.read(name))
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise DamagedFileError(file, f"is damaged or cut short ({_first_line(error)})", remedy) from error
    if wrong is not None:
        raise DamagedFileError(file, f"is damaged: the checksum of {wrong} does not fit", remedy)


def _refuse_other_calls(content: bytes) -> None:
    """Refuse a pickle that names more than what tensors, plain values and states of generators are made of.

    `weights_only=True` lets a file call `bytearray(10**10)` or `torch.Tensor(10**10)` as well.
    """
    for operation, argument, _ in pickletools.genops(content):
        if operation.name not in ("GLOBAL", "STACK_GLOBAL"):
            continue
        name = str(argument).replace(" ", ".")
        is_of_torch = _TORCH_NAME.fullmatch(name) and name != "torch.UntypedStorage"
        if operation.name == "STACK_GLOBAL" or not (is_of_torch or name in _CALLS):
            raise ValueError(f"it calls {printable(name)}")


def tensors_of(value: Any) -> list[Tensor]:
    """Return all tensors within nested dicts, lists and tuples; what is there many times is looked at once."""
    return [part for part in _parts_of(value) if isinstance(part, Tensor)]


def _parts_of(value: Any) -> Iterator[Any]:
    """Yield what nested dicts, lists and tuples hold."""
    seen, left = set(), [value]
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, dict):
            left += part.values()
        elif isinstance(part, (list, tuple)):
            left += part
        else:
            yield part


def _is_a_tree(content: Any) -> bool:
    """Return whether nested dicts, lists and tuples have an end, and at most `_MAX_VALUES` values one by one.

    A pickle of a few lines can hold a list of ten times a list of ten times another, and so on.
    """
    sizes: dict[int, int] = {}
    open_parts: set[int] = set()
    left = [(content, False)]
    while left:
        part, done = left.pop()
        values = list(part.values()) if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else []
        if done:
            open_parts.remove(id(part))
            sizes[id(part)] = 1 + sum(sizes.get(id(value), 1) for value in values)
            if sizes[id(part)] > _MAX_VALUES:
                return False
        elif id(part) in open_parts:
            return False
        elif values and id(part) not in sizes:
            open_parts.add(id(part))
            left.append((part, True))
            left += [(value, False) for value in values if isinstance(value, (dict, list, tuple))]
    return True


def _is_dense(tensor: Tensor) -> bool:
    """Return whether all elements of a tensor are in memory; sizes with a stride of zero claim what is not there."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def is_finite_state(state: Any) -> bool:
    """Return whether the nested state of an optimizer or schedule holds finite tensors, and no NaN among its numbers.

    Infinity is a number that some schedules begin with.
    """
    return all(
        is_finite_tensor(part) if isinstance(part, Tensor) else not (isinstance(part, float) and math.isnan(part))
        for part in _parts_of(state)
    )


def is_finite_tensor(value: Any, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None) -> bool:
    """Return whether a value from a file is a dense tensor without NaN and infinity, of the given dtype and shape.

    Args:
        value: value from a file.
        dtype: required dtype; None for any.
        shape: required shape; None for any.
    """
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and (dtype is None or value.dtype == dtype)
        and (shape is None or tuple(value.shape) == tuple(shape))
        and (not value.is_floating_point() or bool(torch.isfinite(value).all()))
    )


def _first_line(error: BaseException) -> str:
    kind = "not readable as tensors" if isinstance(error, pickle.UnpicklingError) else type(error).__name__
    return f"{kind}: {str(error).strip().splitlines()[0]}" if str(error).strip() else kind
