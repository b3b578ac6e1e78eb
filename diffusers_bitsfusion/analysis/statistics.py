"""How metrics, numbers of bits and ways of measuring agree over the layers (paper, section 4, Tables 1 and 2)."""

from __future__ import annotations

import numpy as np

from .results import Analysis


def metric_correlations(analysis: Analysis, bits: int) -> tuple[list[str], np.ndarray]:
    """|Pearson| between the metrics over the layers at one number of bits (paper, Table 1).

    Returns:
        names of the m metrics, matrix (m, m); NaN where a metric does not vary. Layers whose PSNR is infinite are
        left out.
    """
    names = list(analysis.header.metrics)
    return names, _pearson([analysis.metric(name, bits) for name in names])


def width_correlations(analysis: Analysis, metric: str) -> np.ndarray:
    """|Pearson| of one metric between the measured numbers of bits (paper, Table 2): (widths, widths)."""
    return _pearson([analysis.metric(metric, bits) for bits in analysis.header.bits])


def rank_correlations(analysis: Analysis, other: Analysis) -> dict[str, float]:
    """Spearman's rank correlation of two analyses' damage over the layers, as of an estimate and the full analysis.

    Returns:
        by number of bits ("1", "2", "3"), and of all (layer, bits) together as "all".

    Raises:
        ValueError: the analyses are of different models or numbers of bits.
    """
    analysis.check_model(other.shapes, "the other one")
    if analysis.header.bits != other.header.bits:
        raise ValueError(f"The analyses have bits {analysis.header.bits} and {other.header.bits}; they must agree.")
    order = list(analysis.header.layers)
    columns = {}
    for bits in analysis.header.bits:
        damages = analysis.damage(bits), other.damage(bits)
        columns[str(bits)] = [np.array([damage[name] for name in order]) for damage in damages]
    columns["all"] = [np.concatenate(parts) for parts in zip(*columns.values(), strict=True)]
    return {name: _spearman(*pair) for name, pair in columns.items()}


def _pearson(columns: list[np.ndarray]) -> np.ndarray:
    stacked = np.stack(columns)
    finite = stacked[:, np.isfinite(stacked).all(axis=0)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.abs(np.atleast_2d(np.corrcoef(finite)))


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[group]
