"""Seeds derived from several numbers, by a hash: with a sum, neighbouring seeds would share most of their noise."""

from __future__ import annotations

import numpy as np
import torch


def derived_seed(*numbers: int, bits: int = 32) -> int:
    """A seed for the numbers, which tell its purpose and place apart.

    Args:
        *numbers: not negative.
        bits: 32, or 63 for torch's generators, which take signed integers.
    """
    sequence = np.random.SeedSequence(numbers)
    if bits == 32:
        return int(sequence.generate_state(1, np.uint32)[0])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(64 - bits))


def cpu_generator(seed: int) -> torch.Generator:
    """torch's generator on the CPU, so that the random numbers are the same on every device."""
    return torch.Generator("cpu").manual_seed(seed)
