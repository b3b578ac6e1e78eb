"""Captions to text states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class TextEncoder:
    """The frozen text encoder of a Stable Diffusion pipeline.

    Args:
        tokenizer: its tokenizer.
        model: its text encoder, on the device that states should be on.
    """

    def __init__(self, tokenizer: Any, model: Any):
        self.tokenizer, self.model = tokenizer, model
        self._empty: Tensor | None = None

    def encode(self, captions: Sequence[str], dropped: Tensor | None = None) -> Tensor:
        """States [captions, tokens, width]; those of the empty text where `dropped` bool [captions] is true."""
        states = self._states(captions)
        return states if dropped is None else self.replace_by_empty(states, dropped)

    def replace_by_empty(self, states: Tensor, dropped: Tensor) -> Tensor:
        """`states` [batch, tokens, width] with those of the empty text where `dropped` bool [batch] is true."""
        if self._empty is None:
            self._empty = self._states([""])
        return torch.where(dropped.to(states.device).view(-1, 1, 1), self._empty, states)

    @torch.no_grad()
    def _states(self, captions: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(captions),
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        return self.model(tokens.input_ids.to(self.model.device), return_dict=False)[0]
