"""Images from the same noise, their seconds and their difference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops


def sample(
    pipe: DiffusionPipeline, seed: int, on_step: Callable[[int, int], None], **arguments: Any
) -> tuple[Image.Image, float]:
    """Return an image, and the seconds that its sampling took.

    Args:
        pipe: a text-to-image pipeline.
        seed: of the noise to start from, sampled on the CPU: the same noise for every pipeline.
        on_step: called after each denoising step with its number, from 1, and the number of all.
        arguments: of the pipeline's call.
    """

    def after_step(pipe: DiffusionPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step + 1, pipe.num_timesteps)
        return tensors

    start = time.perf_counter()
    generator = torch.Generator("cpu").manual_seed(seed)
    image = pipe(generator=generator, callback_on_step_end=after_step, **arguments).images[0]
    return image, time.perf_counter() - start


def warm_up(pipe: DiffusionPipeline, **arguments: Any) -> None:
    """Run one step of the sampling that follows, so that the seconds of the first image contain no preparations."""

    def stop(pipe: DiffusionPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True  # It is diffusers' own flag to skip the steps that are left.
        return tensors

    pipe(callback_on_step_end=stop, **arguments)


def difference(a: Image.Image, b: Image.Image) -> tuple[Image.Image, float]:
    """Return the absolute difference of two RGB images, and their PSNR in dB, infinite where they are equal.

    Raises:
        ValueError: they differ in size.
    """
    if a.size != b.size:
        raise ValueError(f"Images of {a.size} and {b.size} pixels cannot be compared: use pipelines of one size.")
    image = ImageChops.difference(a, b)
    mse = np.square(np.asarray(image, np.float64)).mean()
    return image, 10 * math.log10(255**2 / mse) if mse else math.inf
