from __future__ import annotations

import numpy as np
import pytest
from scipy import linalg

from diffusers_bitsfusion.evaluation import cmmd, frechet_distance
from diffusers_bitsfusion.evaluation import distribution as module


def _with_moments(rng, n: int, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """(n, d) vectors whose sample mean and covariance are exactly these."""
    x = rng.normal(size=(n, len(mean)))
    x -= x.mean(0)
    whitened = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_in_closed_form():
    rng = np.random.default_rng(0)
    d = 6
    means = rng.normal(size=(2, d))
    covariances = [m @ m.T + np.eye(d) for m in rng.normal(size=(2, d, d))]
    a, b = (_with_moments(rng, 50 + 20 * i, means[i], covariances[i]) for i in range(2))
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_with_fewer_vectors_than_features():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(5, 40)), rng.normal(size=(7, 40)) + 1
    # The trace of the root from the eigenvalues of the product: real and at least 0 up to rounding.
    eigenvalues = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real.clip(min=0)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T))
    expected -= 2 * np.sqrt(eigenvalues).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_a_shift_and_of_nothing():
    a = np.random.default_rng(2).normal(size=(30, 4)).astype(np.float32)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + np.float32(2)) == pytest.approx(4 * 2**2, rel=1e-4)


def test_frechet_distance_needs_two_vectors():
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(np.ones((1, 3)), np.ones((5, 3)))


def test_cmmd_is_the_double_sum_over_pairs(monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 4)
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(9, 5)).astype(np.float32), rng.normal(size=(11, 5)).astype(np.float32) + 1

    def unit(x):
        return [row / np.sqrt((row.astype(float) ** 2).sum()) for row in x]

    def mean_kernel(x, y):
        return np.mean([np.exp(-((p - q) ** 2).sum() / (2 * 10.0**2)) for p in unit(x) for q in unit(y)])

    expected = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    assert cmmd(a, b) == pytest.approx(expected, rel=1e-6)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)
