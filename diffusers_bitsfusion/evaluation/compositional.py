"""Scores by category and overall, with bootstrap confidence intervals; the scorer that gives them is a plug-in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .plugins import load_function

Scorer = Callable[[Sequence[np.ndarray], Sequence[Any]], Sequence[float]]

OVERALL = "overall"
_CONFIDENCE = 0.95
_RESAMPLES = 2000
_BLOCK = 2**18  # random draws held at once


@dataclass(frozen=True)
class ConfidenceInterval:
    """A mean and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def load_scorer(name: str) -> Scorer:
    """Return the function that `name`, written MODULE:FUNCTION, stands for.

    Modules in the working directory are found.

    It takes n images (height, width, 3) uint8 and the n specifications from the prompts file, and returns n numbers,
    0 or False for an image that misses its prompt, 1 or True for one that fits.

    Raises:
        ValueError: no such module or function, or `name` is not written so.
    """
    return load_function(name, "scorer")


def judge(scorer: Scorer, images: np.ndarray, specs: Sequence[Any]) -> np.ndarray:
    """Return the scorer's verdicts on (n, height, width, 3) uint8 images, as (n,) float64.

    Raises:
        ValueError: it did not return n finite numbers.
    """
    scores = np.asarray(scorer(list(images), list(specs)), np.float64)
    if scores.shape != (len(images),) or not np.isfinite(scores).all():
        raise ValueError(f"The scorer must return {len(images)} finite numbers, one an image.")
    return scores


def bootstrap_mean(values: np.ndarray, seed: int = 0) -> ConfidenceInterval:
    """Return the mean of (n,) values with a percentile bootstrap interval; infinite where a value is."""
    return _interval(values, _resampled_means(values, np.random.default_rng(seed)))


def bootstrap_scores(
    scores: np.ndarray, categories: Sequence[str | None], seed: int = 0
) -> dict[str, ConfidenceInterval]:
    """Return mean scores by category and overall, with percentile bootstrap intervals.

    Overall is the mean over the categories, each counting the same, as in GenEval. Prompts are drawn again within
    their category. Where all scores of a category are equal, its interval has no width.

    For two models on the same prompts and seeds, give the difference of their scores: drawing whole prompts again
    pairs them, which is much sharper than two separate intervals, and exactly 0 for equal models.

    Args:
        scores: (n,) numbers.
        categories: the category of each, or None for all, which leaves the overall mean alone.
        seed: of the resampling.

    Returns:
        "overall" first, then the categories as they first appear.

    Raises:
        ValueError: a category is called "overall".
    """
    names = list(dict.fromkeys(categories))
    if OVERALL in names:
        raise ValueError(f"A category cannot be called {OVERALL!r}.")
    labels = np.array([names.index(category) for category in categories])
    rng = np.random.default_rng(seed)
    groups = [scores[labels == index] for index in range(len(names))]
    resampled = [_resampled_means(group, rng) for group in groups]
    means = np.array([group.mean() for group in groups])
    overall = {OVERALL: _interval(means, np.mean(resampled, axis=0))}
    return overall | {
        name: _interval(group, drawn)
        for name, group, drawn in zip(names, groups, resampled, strict=True)
        if name is not None
    }


def _resampled_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (`_RESAMPLES`,) means of as many values, sampled with replacement."""
    rows = max(1, _BLOCK // len(values))
    blocks = [min(rows, _RESAMPLES - start) for start in range(0, _RESAMPLES, rows)]
    return np.concatenate([values[rng.integers(len(values), size=(n, len(values)))].mean(axis=1) for n in blocks])


def _interval(values: np.ndarray, resampled: np.ndarray) -> ConfidenceInterval:
    # "lower" and "higher" take means that occurred, so that infinite ones are not interpolated to NaN.
    low = np.quantile(resampled, (1 - _CONFIDENCE) / 2, method="lower")
    high = np.quantile(resampled, (1 + _CONFIDENCE) / 2, method="higher")
    return ConfidenceInterval(float(values.mean()), float(low), float(high))
