"""Distances between two sets of feature vectors. Which picture belongs to which prompt does not enter."""

from __future__ import annotations

import numpy as np

_ROWS = 1024


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two sets; on image features, the FID.

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
    """CMMD (arXiv 2401.09603): 1000 × the squared maximum mean discrepancy of normalized CLIP features.

    Gaussian kernel of bandwidth `sigma`; the mean over all pairs, a vector with itself included, as published.

    Args:
        a: (n, d) features.
        b: (m, d) features.
    """
    a, b = (x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return 1000 * (_mean_kernel(a, a, sigma) + _mean_kernel(b, b, sigma) - 2 * _mean_kernel(a, b, sigma))


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,), and R (min(n, d), d) such that R'R is the covariance."""
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    return mean, np.linalg.qr(features - mean, mode="r") / np.sqrt(len(features) - 1)


def _mean_kernel(a: np.ndarray, b: np.ndarray, sigma: float) -> float:
    """The mean of the kernel over all pairs of unit vectors, a block of rows at a time."""
    total = sum(np.exp((a[i : i + _ROWS] @ b.T - 1) / sigma**2).sum() for i in range(0, len(a), _ROWS))
    return float(total) / (len(a) * len(b))
