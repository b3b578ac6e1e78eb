"""Prompt embeddings of captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class TextEncoder:
    """Frozen text encoder of a Stable Diffusion pipeline.

    Args:
        tokenizer: tokenizer of the pipeline.
        model: text encoder of the pipeline, on the device that the prompt embeddings are to be on.
    """

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer, self.model = tokenizer, model
        self._empty: Tensor | None = None

    def encode(self, captions: Sequence[str], dropped: Tensor | None = None) -> Tensor:
        """Return the prompt embeddings of captions, floating [captions, tokens, width].

        Args:
            captions: captions.
            dropped: bool [captions], true where the empty text replaces the caption; None to drop none.
        """
        states = self._states(captions)
        return states if dropped is None else self.replace_by_empty(states, dropped)

    def replace_by_empty(self, states: Tensor, dropped: Tensor) -> Tensor:
        """Replace prompt embeddings by those of the empty text.

        Args:
            states: prompt embeddings, floating [batch, tokens, width].
            dropped: bool [batch], true where the empty text replaces them.

        Returns:
            Floating [batch, tokens, width].
        """
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
        states: Tensor = self.model(tokens.input_ids.to(self.model.device), return_dict=False)[0]
        return states
