"""The paper's analysis of one layer: round it alone, train it, sample with it and compare (paper, section 4)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor

from ..calibration.calls import Call
from ..config.bitsfusion import BitsFusionConfig
from ..evaluation import clip_score, generate_images, image_metrics
from ..nn.conversion import replace_module
from ..qat import end_training, prepare_qat
from .header import Item
from .layer_cost import temporary_weight
from .study import Record, Study


def trained_weight(
    model: ModelMixin, name: str, bits: int, calls: Sequence[Call], steps: int, learning_rate: float
) -> Tensor:
    """Return a layer's rounded weight after training it alone towards the full-precision model's predicted noise.

    AdamW without weight decay trains latent weight and scales, on one recorded call a step, in turn. The model is
    unchanged afterwards.

    Args:
        model: full-precision model, whose parameters do not require gradients.
        name: name of the layer.
        bits: number of bits of its balanced grid.
        calls: calls of the full-precision model, on its device.
        steps: number of training steps; 0 for the weight as rounding gives it.
        learning_rate: learning rate of AdamW, as a fraction of the weights' root mean square, since the steps of AdamW
            do not depend on the size of the weights.

    Returns:
        fp32, of the weight's shape.
    """
    original = model.get_submodule(name)
    step = learning_rate * float(original.weight.square().mean().sqrt())
    prepare_qat(model, BitsFusionConfig(recipe=bits, time_embedding="keep"), layers=[name])
    try:
        layer = model.get_submodule(name)
        optimizer = torch.optim.AdamW([layer.weight, layer.scale], lr=step, weight_decay=0.0)
        with torch.enable_grad():
            for call in itertools.islice(itertools.cycle(calls), steps):
                F.mse_loss(call.repeat(model).float(), call.output.float()).backward()
                optimizer.step()
                optimizer.zero_grad()
        codes, scale = layer.codes_and_scale()
        weight: Tensor = (codes * scale.unsqueeze(1)).view_as(layer.weight)
        return weight
    finally:
        replace_module(model, name, original)
        end_training(model)


def measure(study: Study, items: Iterable[Item]) -> Iterator[Record]:
    """Train, sample and compare, one (layer, bits) after the other.

    Yields:
        Means over the images: MSE, PSNR, SSIM and where requested LPIPS against the full-precision images on pixels in
        [0, 1], `clip_drop` in points of the CLIP score (100 times the cosine), and the seconds of the measurement.
    """
    settings, reference = study.settings, study.reference
    if study.clip is not None:
        texts = study.clip.text_features(study.captions)
        expected = clip_score(study.clip.image_features(reference.images), texts)
    for name, bits in items:
        start = time.perf_counter()
        weight = trained_weight(study.model, name, bits, reference.calls, settings.qat_steps, settings.learning_rate)
        with temporary_weight(study.layers[name], weight):
            images = generate_images(study.pipeline, study.captions, settings.sampling, progress=False)
        metrics = image_metrics(images, reference.images, settings.lpips)
        if study.clip is not None:
            metrics["clip_drop"] = expected - clip_score(study.clip.image_features(images), texts)
        values = {metric: _mean(each) for metric, each in metrics.items()}
        yield (name, bits), values | {"seconds": time.perf_counter() - start}


def _mean(values: np.ndarray) -> float | None:
    """Return the mean, or None where a PSNR is infinite, which JSON cannot hold."""
    mean = float(values.mean())
    return mean if np.isfinite(mean) else None
