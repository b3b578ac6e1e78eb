"""Tokenizers that are called without being changed: a call's truncation and padding would stay in what is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import DiffusionPipeline


@contextmanager
def unchanged_tokenizers(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Put back the truncation and padding of a pipeline's tokenizers when the block ends."""
    found = (getattr(part, "backend_tokenizer", None) for part in pipeline.components.values())
    states = [(tokenizer, tokenizer.truncation, tokenizer.padding) for tokenizer in found if tokenizer is not None]
    try:
        yield
    finally:
        for tokenizer, truncation, padding in states:
            tokenizer.no_truncation() if truncation is None else tokenizer.enable_truncation(**truncation)
            tokenizer.no_padding() if padding is None else tokenizer.enable_padding(**padding)
