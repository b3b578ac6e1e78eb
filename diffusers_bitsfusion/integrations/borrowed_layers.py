"""Layers that a model shares with another, whose own they are: neither packed nor put back with the borrower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# What `ZImageControlNetModel.from_transformer`, which its pipelines call, takes over from the transformer.
_BORROWED = {
    "ZImageControlNetModel": (
        "t_embedder", "all_x_embedder", "cap_embedder", "rope_embedder", "noise_refiner", "context_refiner",
        "x_pad_token", "cap_pad_token",
    ),
}  # fmt: skip


@contextmanager
def own_layers(model: nn.Module) -> Iterator[None]:
    """Take off what a model has borrowed, within a `with`."""
    borrowed = {
        name: part for name in _BORROWED.get(type(model).__name__, ()) if (part := getattr(model, name)) is not None
    }
    for name in borrowed:
        setattr(model, name, None)
    try:
        yield
    finally:
        for name, part in borrowed.items():
            setattr(model, name, part)
