"""Images for prompts, each from a seed of its own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..utils.errors import shown
from ..utils.json_files import is_count, is_number
from ..utils.processes import process_state
from ..utils.seeds import cpu_generator, derived_seed
from .image_folder import ImageFolder


@dataclass(frozen=True)
class Sampling:
    """The settings by which images are sampled.

    Attributes:
        steps: inference steps.
        guidance_scale: of classifier-free guidance.
        seed: base seed; the noise of an image depends on it and on the image's place in the list alone.
        batch_size: images sampled at once.
        scheduler: name of a diffusers scheduler; None keeps the pipeline's own.

    Raises:
        ValueError: a value is of another type or out of range; the message names it.
    """

    steps: int = 50
    guidance_scale: float = 7.5
    seed: int = 1024
    batch_size: int = 8
    scheduler: str | None = None

    def __post_init__(self) -> None:
        for name, minimum in (("steps", 1), ("seed", 0), ("batch_size", 1)):
            if not is_count(getattr(self, name), minimum):
                raise ValueError(f"{name} is {shown(getattr(self, name))}, but must be an integer from {minimum}.")
        if not (is_number(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"guidance_scale is {shown(self.guidance_scale)}, but must be at least 0.")
        if not isinstance(self.scheduler, (str, type(None))):
            raise ValueError(f"scheduler is {shown(self.scheduler)}, but must be a name.")


DEFAULT_SAMPLING = Sampling()


def generate_images(
    pipeline: DiffusionPipeline,
    captions: Sequence[str],
    sampling: Sampling,
    folder: ImageFolder | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Generate one image a caption, and hold all of them in memory; `draw_images` holds a batch.

    Args:
        pipeline: any text-to-image pipeline; its scheduler is used as it is.
        captions: n prompts.
        sampling: steps, guidance, seed, batch size.
        folder: keeps the images; those that it holds already are not generated again.
        progress: whether to show a progress bar.

    Returns:
        (n, height, width, 3) uint8.

    Raises:
        ValueError: the pipeline takes no prompt, or generates NaN.
    """
    if folder is not None:
        draw_images(pipeline, captions, sampling, folder, progress)
        return folder.block(range(len(captions)))
    _check_takes_prompts(pipeline)
    images = []
    with tqdm(total=len(captions), desc="images", disable=not progress) as bar:
        for batch in _batches(range(len(captions)), sampling.batch_size):
            images.append(_generate(pipeline, captions, batch, sampling))
            bar.update(len(batch))
    return np.concatenate(images)


def draw_images(
    pipeline: DiffusionPipeline,
    captions: Sequence[str],
    sampling: Sampling,
    folder: ImageFolder,
    progress: bool = True,
) -> None:
    """Generate one image a caption into a folder, a batch in memory at a time, except those that it holds.

    Under `accelerate launch` the processes share the batches out, on a folder that all of them see; all of them come
    back when all images are there.

    Args:
        pipeline: any text-to-image pipeline; its scheduler is used as it is.
        captions: n prompts.
        sampling: steps, guidance, seed, batch size.
        folder: receives the images.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the pipeline takes no prompt, or generates NaN.
    """
    _check_takes_prompts(pipeline)
    state = process_state()
    missing = folder.missing(len(captions))
    state.wait_for_everyone()  # No process samples before all have looked.
    batches = _batches(missing, sampling.batch_size)
    own = batches[state.process_index :: state.num_processes]
    done, total = len(captions) - len(missing), len(captions) - len(missing) + sum(map(len, own))
    with tqdm(total=total, initial=done, desc="images", disable=not (progress and state.is_main_process)) as bar:
        for batch in own:
            for index, image in zip(batch, _generate(pipeline, captions, batch, sampling), strict=True):
                folder.save(index, image)
            bar.update(len(batch))
    state.wait_for_everyone()


def _check_takes_prompts(pipeline: DiffusionPipeline) -> None:
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"{type(pipeline).__name__} takes no prompt.")


def _batches(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _generate(
    pipeline: DiffusionPipeline, captions: Sequence[str], indices: Sequence[int], sampling: Sampling
) -> np.ndarray:
    """Return the images of some captions, (len(indices), height, width, 3) uint8."""
    images = pipeline(
        prompt=[captions[index] for index in indices],
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        generator=[cpu_generator(derived_seed(sampling.seed, index)) for index in indices],
        output_type="np",
    ).images
    if not np.isfinite(images).all():
        raise ValueError(f"The pipeline generated NaN for one of the prompts {[captions[i] for i in indices]}.")
    eight_bits: np.ndarray = (images * 255).round().astype(np.uint8)
    return eight_bits
