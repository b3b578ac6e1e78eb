"""Processes that share work: those of `accelerate launch`, or on CPUs of `torchrun`."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state(**options: Any) -> PartialState:
    """Return the state of this process among those that were launched together.

    By itself accelerate treats each process on CPUs as the only one, which would do all of the work.

    Args:
        **options: options of `torch.distributed.init_process_group`; the first call in a process decides.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, **options)
