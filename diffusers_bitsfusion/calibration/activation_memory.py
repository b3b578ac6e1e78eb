"""Memory of the activations that a backward pass reads: counted without saving them, and bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ..utils.private_names import DIFFUSERS_CHECKPOINTING


@contextmanager
def bounded_activations(model: Any, memory: float, forward: Callable[[], Tensor]) -> Iterator[None]:
    """Use gradient checkpointing within the block where the activations of `forward` need more than `memory` bytes.

    Raises:
        ValueError: they do, and the model has no gradient checkpointing.
    """
    need = saved_bytes(model, forward)
    if need <= memory:
        yield
        return
    if not DIFFUSERS_CHECKPOINTING.read(model, False):
        raise ValueError(
            f"Tuning needs {need / 1e9:.2g} GB for the activations of one call, more than memory_gb leaves, and "
            f"{type(model).__name__} has no gradient checkpointing. Lower batch_size or raise memory_gb."
        )
    before = model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if not before:
            model.disable_gradient_checkpointing()


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes that a forward pass would save for the backward pass, parameters aside, without saving them."""
    total = 0
    seen: dict[int, StorageWeakRef] = {parameter.data_ptr(): _storage(parameter) for parameter in model.parameters()}

    def note(tensor: Tensor) -> Any:
        nonlocal total
        # Several operations save the same tensor, and a new tensor may have the address of a freed one.
        address = tensor.untyped_storage().data_ptr()
        if address not in seen or seen[address].expired():
            seen[address] = _storage(tensor)
            total += tensor.untyped_storage().nbytes()

    with torch.enable_grad(), saved_tensors_hooks(note, lambda nothing: nothing):
        forward()
    return total


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())
