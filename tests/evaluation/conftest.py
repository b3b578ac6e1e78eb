"""Prompts with specifications, for all tests of the evaluation."""

from __future__ import annotations

import pytest

from diffusers_bitsfusion.evaluation import Prompt


@pytest.fixture
def prompts() -> list[Prompt]:
    """Six prompts in two categories; the specification is what `bright` wants."""
    return [Prompt("a" * (1 + i), ("dark", "light")[i % 2], {"above": 100 + 20 * (i % 2)}) for i in range(6)]
