"""Processes that share work: those of `accelerate launch`, or on CPUs of `torchrun`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import distributed
from torch.distributed import distributed_c10d

from .private_names import TORCH_STORE

# Key, in the store that the processes share, of the error of the first one that failed.
_ERROR = "diffusers_bitsfusion/error"

# Stores in which an error was told. The process that serves one keeps it, or others could not read it after the group
# has gone.
_told: list[Any] = []


def process_state(**options: Any) -> PartialState:
    """Return the state of this process among those that were launched together.

    By itself accelerate treats each process on CPUs as the only one, which would do all of the work.

    Args:
        **options: options of `torch.distributed.init_process_group`; the first call in a process decides.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, **options)


@contextmanager
def failing_together() -> Iterator[None]:
    """End the other processes with the error of the first one that fails in the block.

    The process that fails leaves the group, which wakes those that wait for it; each raises its error in turn. Also a
    decorator.

    Raises:
        RuntimeError: another process has failed; the message names it and its error.
    """
    try:
        yield
    except BaseException as error:
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            raise
        earlier = _tell(f"Process {distributed.get_rank()} failed: {type(error).__name__}: {error}")
        if distributed.get_backend() == "gloo":  # NCCL ends with the process, which the launcher ends.
            distributed.destroy_process_group()
        if earlier is not None and isinstance(error, Exception):
            raise RuntimeError(earlier) from error
        raise


def _tell(message: str) -> str | None:
    """Tell the other processes of an error; return that of an earlier one, if any can be read."""
    with suppress(RuntimeError):  # The store is gone with the process that kept it.
        store = TORCH_STORE.require(distributed_c10d)()
        _told.append(store)
        if store.check([_ERROR]):
            return str(store.get(_ERROR).decode())
        store.set(_ERROR, message)
    return None
