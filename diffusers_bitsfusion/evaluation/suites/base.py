"""The interface of the suites: what they draw, how a picture is scored, and what the scores come to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Record = dict[str, Any]


@dataclass(frozen=True)
class PictureScorer:
    """Scores pictures with models that are loaded.

    Attributes:
        score: takes the places of n captions and their pictures, (n, height, width, 3) uint8, and returns a JSON-safe
            record each, and (n, `width`) float32 features where there is a width.
        width: of the features.
    """

    score: Callable[[Sequence[int], np.ndarray], tuple[list[Record], np.ndarray | None]]
    width: int = 0


@dataclass(frozen=True)
class Scores:
    """What is known of each of n pictures: a record, and (n, d) features, mapped from a file, where there are any."""

    records: list[Record]
    features: np.ndarray | None = None


class Suite(ABC):
    """A published evaluation.

    Attributes:
        name: as `--suite` takes it.
        captions: what to draw, a picture each.
        settings: JSON-safe; all that the scores depend on beside the pictures.
        needs_reference: whether it only compares.
        note: what a reader of the figures must know.
    """

    name: str
    captions: list[str]
    settings: dict[str, Any]
    needs_reference = False
    note = ""

    @abstractmethod
    def load(self) -> PictureScorer:
        """Load the models.

        Raises:
            OSError, ValueError: one is missing or of the wrong kind; the message says what to download.
        """

    @abstractmethod
    def values(self, scores: Scores) -> np.ndarray:
        """Return the numbers that are averaged, (m,) float64; those of two models are subtracted."""

    @abstractmethod
    def summary(self, values: np.ndarray) -> dict[str, Any]:
        """Return a `ConfidenceInterval` by name, or by name and category, for `values` or a difference of such."""

    def against(self, scores: Scores, reference: Scores) -> dict[str, Any]:
        """Return what can only be said against a reference, as `ConfidenceInterval`s and numbers by name."""
        return {}
