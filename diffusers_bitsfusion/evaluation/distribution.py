"""Distances between two sets of feature vectors, whatever image belongs to which prompt.

The features may be arrays mapped from files: a block of rows is in memory at a time.
"""

from __future__ import annotations

import numpy as np

_ROWS = 1024


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Fréchet distance of the Gaussians fitted to two sets; on image features, the FID.

    |μa − μb|² + tr(Ca + Cb − 2 (Ca Cb)^½), covariances with n − 1. Sets of few vectors make it too large: compare
    only figures of equal n.

    Args:
        a: (n, d) features.
        b: (m, d) features.

    Raises:
        ValueError: a set has fewer than two vectors.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("A Fréchet distance needs at least two vectors in each set.")
    mean_a, root_a = _gaussian(a)
    mean_b, root_b = _gaussian(b)
    # With Ca = Ra'Ra and Cb = Rb'Rb, the trace of (Ca Cb)^½ is the sum of the singular values of Ra Rb': no square
    # root of a matrix that is singular wherever n ≤ d.
    shared = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = np.square(mean_a - mean_b).sum() + np.square(root_a).sum() + np.square(root_b).sum() - 2 * shared
    return max(float(distance), 0.0)


def cmmd(a: np.ndarray, b: np.ndarray, sigma: float = 10.0) -> float:
    """Return the CMMD: 1000 × the squared maximum mean discrepancy of normalized CLIP features (arXiv 2401.09603).

    Gaussian kernel of bandwidth `sigma`; the mean over all pairs, a vector with itself included, as published.

    Args:
        a: (n, d) features.
        b: (m, d) features.
    """
    return 1000 * (_mean_kernel(a, a, sigma) + _mean_kernel(b, b, sigma) - 2 * _mean_kernel(a, b, sigma))


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean (d,), and R (min(n, d), d) such that R'R is the covariance.

    A block of rows at a time, since features may lie on disk: the triangle of all rows so far is the triangle of the
    last one with the next rows below it.
    """
    blocks = range(0, len(features), _ROWS)
    mean = sum(features[i : i + _ROWS].sum(axis=0, dtype=np.float64) for i in blocks) / len(features)
    triangle = np.empty((0, features.shape[1]))
    for i in blocks:
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, features[i : i + _ROWS] - mean]), mode="r"))
    return mean, triangle / np.sqrt(len(features) - 1)


def _mean_kernel(a: np.ndarray, b: np.ndarray, sigma: float) -> float:
    """Return the mean of the kernel over all pairs of normalized vectors, two blocks of rows at a time."""
    total = 0.0
    for i in range(0, len(a), _ROWS):
        rows = _normalized(a[i : i + _ROWS])
        for j in range(0, len(b), _ROWS):
            total += np.exp((rows @ _normalized(b[j : j + _ROWS]).T - 1) / sigma**2).sum()
    return float(total) / (len(a) * len(b))


def _normalized(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
