"""Correlation of metrics, of numbers of bits and of methods over the layers (paper, section 4, Tables 1 and 2)."""

from __future__ import annotations

import numpy as np

from .results import Analysis


def metric_correlations(analysis: Analysis, bits: int) -> tuple[list[str], np.ndarray]:
    """Return |Pearson| between the metrics over the layers at one number of bits (paper, Table 1).

    Returns:
        (names of the m metrics; float64 [m, m], NaN where a metric does not vary). Layers whose PSNR is infinite are
        left out.
    """
    names = list(analysis.header.metrics)
    return names, _pearson([analysis.metric(name, bits) for name in names])


def width_correlations(analysis: Analysis, metric: str) -> np.ndarray:
    """Return |Pearson| of one metric between the numbers of bits, float64 [widths, widths] (paper, Table 2)."""
    return _pearson([analysis.metric(metric, bits) for bits in analysis.header.bits])


def rank_correlations(analysis: Analysis, other: Analysis) -> dict[str, float]:
    """Return Spearman's rank correlation of two analyses' sensitivities over the layers.

    Args:
        analysis: an analysis, such as the full one.
        other: another analysis of the same model, such as an estimate.

    Returns:
        Correlation by number of bits ("1", "2", "3"), and over all (layer, bits) as "all".

    Raises:
        ValueError: the analyses are of different models or numbers of bits.
    """
    analysis.check_model(other.shapes, "the other one")
    if analysis.header.bits != other.header.bits:
        raise ValueError(f"The analyses have bits {analysis.header.bits} and {other.header.bits}; they must agree.")
    order = list(analysis.header.layers)
    columns = {}
    for bits in analysis.header.bits:
        pair = analysis.damage(bits), other.damage(bits)
        columns[str(bits)] = [np.array([sensitivity[name] for name in order]) for sensitivity in pair]
    columns["all"] = [np.concatenate(parts) for parts in zip(*columns.values(), strict=True)]
    return {name: _spearman(*pair) for name, pair in columns.items()}


def _pearson(columns: list[np.ndarray]) -> np.ndarray:
    stacked = np.stack(columns)
    finite = stacked[:, np.isfinite(stacked).all(axis=0)]
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations: np.ndarray = np.abs(np.atleast_2d(np.corrcoef(finite)))
    return correlations


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 0; equal values share the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[group]
