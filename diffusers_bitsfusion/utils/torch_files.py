"""The one reader of torch's .pt files: tensors and plain values only, every byte checked, on the CPU."""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from typing import Any

import torch
from torch import Tensor

from .errors import DamagedFileError


def read_torch(file: str | os.PathLike[str], remedy: str, mmap: bool = False) -> Any:
    """Read a file of `torch.save`, wherever it was written, onto the CPU.

    The archive's own checksums are compared first, since torch does not look at them.

    Args:
        file: to read.
        remedy: what to do about a damaged one.
        mmap: whether large tensors stay in the file until they are looked at.

    Raises:
        DamagedFileError: the file is cut short or changed, or holds other things than tensors and plain values.
        FileNotFoundError: there is no such file.
    """
    check_archive(file, remedy)
    try:
        return torch.load(file, weights_only=True, map_location="cpu", mmap=mmap)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever an unpickler meets in bytes that are no pickle
        raise DamagedFileError(file, f"is damaged ({_first_line(error)})", remedy) from error


def check_archive(file: str | os.PathLike[str], remedy: str) -> None:
    """Compare every record of a file of `torch.save` with its checksum.

    Raises:
        DamagedFileError: a record differs, or the file is no archive.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise zipfile.BadZipFile("a record is compressed, which torch never does")
            wrong = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise DamagedFileError(file, f"is damaged or cut short ({_first_line(error)})", remedy) from error
    if wrong is not None:
        raise DamagedFileError(file, f"is damaged: the checksum of {wrong} does not fit", remedy)


def is_finite_tensor(value: Any, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None) -> bool:
    """Whether a value that was read is a dense tensor of a dtype and shape, where given, without NaN and infinity."""
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
