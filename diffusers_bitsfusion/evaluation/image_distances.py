"""Distances between the images of two models, each image compared with its counterpart."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from ..utils.installation import install_command

# Images that are measured at once.
_BATCH = 16


def require_image_metrics(lpips: bool = False) -> None:
    """Refuse to start where a package is missing, before hours of sampling.

    Raises:
        ImportError: torchmetrics, or with `lpips` the package lpips, is not installed.
    """
    if find_spec("torchmetrics") is None:
        raise ImportError(f"Comparing with a reference needs torchmetrics: {install_command('eval')}")
    if lpips and find_spec("lpips") is None:
        # The extra leaves lpips out, which requires torchvision, which does not exist for every build of torch.
        raise ImportError("LPIPS needs the packages lpips and torchvision: pip install lpips torchvision")


def image_metrics(images: np.ndarray, references: np.ndarray, lpips: bool = False) -> dict[str, np.ndarray]:
    """Return MSE, PSNR, SSIM and optionally LPIPS (AlexNet) of each image, on pixel values in [0, 1].

    SSIM has the usual Gaussian window of 11 pixels and mirrors the borders, as torchmetrics does.

    Args:
        images: (n, height, width, 3) uint8.
        references: of the same shape and dtype.
        lpips: needs the package of that name, which fetches its weights on first use.

    Returns:
        Arrays (n,) float64 by name. PSNR is infinite where two images are equal.

    Raises:
        ImportError: a package is missing.
        ValueError: the shapes differ.
    """
    require_image_metrics(lpips)
    if images.shape != references.shape:
        raise ValueError(f"Images of shape {images.shape} cannot be compared with references {references.shape}.")
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    metrics: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "mse": lambda a, b: (a - b).square().mean((1, 2, 3)),
        "psnr": lambda a, b: peak_signal_noise_ratio(a, b, data_range=(0.0, 1.0), dim=(1, 2, 3), reduction="none"),
        "ssim": lambda a, b: structural_similarity_index_measure(a, b, data_range=(0.0, 1.0), reduction="none"),
    }
    if lpips:
        metrics["lpips"] = _lpips()
    values: dict[str, list[Tensor]] = {name: [] for name in metrics}
    for start in range(0, len(images), _BATCH):
        a, b = _pixels(images[start : start + _BATCH]), _pixels(references[start : start + _BATCH])
        for name, metric in metrics.items():
            values[name].append(metric(a, b).reshape(len(a)))
    return {name: torch.cat(parts).double().numpy() for name, parts in values.items()}


def _pixels(images: np.ndarray) -> Tensor:
    """Return (n, 3, height, width) float32 in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def _lpips() -> Callable[[Tensor, Tensor], Tensor]:
    from lpips import LPIPS

    network = LPIPS(net="alex", verbose=False).eval()

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        distances: Tensor = network(2 * a - 1, 2 * b - 1)
        return distances

    return distance
