"""The interface of the suites: their captions, how an image is scored, and the summary of the scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Record = dict[str, Any]


@dataclass(frozen=True)
class ImageScorer:
    """A function that scores images, with the models that it needs loaded.

    Attributes:
        score: accepts the places of n captions and their images, (n, height, width, 3) uint8, and returns a JSON-safe
            record each, and (n, `width`) float32 features where there is a width.
        width: of the features.
    """

    score: Callable[[Sequence[int], np.ndarray], tuple[list[Record], np.ndarray | None]]
    width: int = 0


@dataclass(frozen=True)
class Scores:
    """The records of n images, and their (n, d) features, mapped from a file, where there are any."""

    records: list[Record]
    features: np.ndarray | None = None


class Suite(ABC):
    """A published evaluation.

    Attributes:
        name: the value of `--suite`.
        captions: of the images, an image each.
        settings: JSON-safe; all that the scores depend on beside the images.
        needs_reference: whether it only compares.
        note: what a reader of the figures must know.
    """

    name: str
    captions: list[str]
    settings: dict[str, Any]
    needs_reference = False
    note = ""

    @abstractmethod
    def load(self) -> ImageScorer:
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
        """Return what only a comparison with a reference gives, as `ConfidenceInterval`s and numbers by name."""
        return {}
