"""Each metric against its definition, written out in numpy."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from diffusers_bitsfusion.evaluation import image_distances as module
from diffusers_bitsfusion.evaluation import image_metrics

pytest.importorskip("torchmetrics")


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """More pictures than one batch, and the same with noise."""
    rng = np.random.default_rng(0)
    smooth = ndimage.zoom(rng.uniform(0, 255, (20, 4, 6, 3)), (1, 6, 4, 1), order=1)
    noise = rng.normal(0, 1, smooth.shape) * np.linspace(5, 40, 20)[:, None, None, None]
    return smooth.astype(np.uint8), (smooth + noise).clip(0, 255).astype(np.uint8)


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004 on one (h, w) channel in [0, 1]: Gaussian window of 11 with σ 1.5, borders mirrored."""

    def window(x):
        return ndimage.gaussian_filter(x, 1.5, radius=5, mode="mirror")

    c1, c2 = 0.01**2, 0.03**2
    ma, mb = window(a), window(b)
    va, vb, covariance = window(a * a) - ma**2, window(b * b) - mb**2, window(a * b) - ma * mb
    ssim = (2 * ma * mb + c1) * (2 * covariance + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return ssim.mean()


def test_against_the_definitions(pair):
    images, references = pair
    metrics = image_metrics(images, references)
    a, b = images / 255.0, references / 255.0
    mse = ((a - b) ** 2).mean((1, 2, 3))
    ssim = [np.mean([_ssim(x[..., c], y[..., c]) for c in range(3)]) for x, y in zip(a, b, strict=True)]
    assert set(metrics) == {"mse", "psnr", "ssim"}
    np.testing.assert_allclose(metrics["mse"], mse, rtol=1e-4)
    np.testing.assert_allclose(metrics["psnr"], -10 * np.log10(mse), rtol=1e-4)
    np.testing.assert_allclose(metrics["ssim"], ssim, atol=1e-4)


def test_equal_pictures(pair):
    metrics = image_metrics(pair[0], pair[0])
    assert (metrics["mse"] == 0).all() and np.isposinf(metrics["psnr"]).all()
    np.testing.assert_allclose(metrics["ssim"], 1, atol=1e-5)


def test_pictures_of_different_sizes_are_refused(pair):
    with pytest.raises(ValueError, match="cannot be compared"):
        image_metrics(pair[0], pair[1][:, 1:])


@pytest.mark.parametrize(
    ("absent", "message"),
    [("torchmetrics", r"pip install diffusers_bitsfusion\[eval\]"), ("lpips", "pip install lpips torchvision")],
)
def test_missing_packages_are_named(monkeypatch, pair, absent, message):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == absent else object())
    with pytest.raises(ImportError, match=message):
        image_metrics(*pair, lpips=True)


def test_lpips_gets_pixels_between_minus_one_and_one(monkeypatch, pair):
    class Network(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()

        def forward(self, a, b):
            assert a.shape[1:] == (3, 24, 24) and a.min() >= -1 and a.min() < -0.5 and 0.5 < a.max() <= 1
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Network))
    images, references = pair
    expected = 2 * np.abs(images / 255.0 - references / 255.0).mean((1, 2, 3))
    np.testing.assert_allclose(image_metrics(images, references, lpips=True)["lpips"], expected, rtol=1e-4)
