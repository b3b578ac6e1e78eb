"""The processes that share a piece of work: those of `accelerate launch`, or on CPUs of `torchrun`."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state(**options: Any) -> PartialState:
    """This process among those that were launched together.

    Accelerate alone takes processes on CPUs for lone ones, each of which would do all of the work.

    Args:
        **options: of `torch.distributed.init_process_group`; the first call in a process decides.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, **options)
