"""The images that are measured: generated once, on disk, shared by all that measures them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..utils.fingerprints import hash_of_folder, hash_of_settings, hash_of_text
from ..utils.processes import process_state
from .generate import Sampling, draw_images
from .image_folder import ImageFolder
from .pipeline import default_device, load_pipeline, scheduler_name


@dataclass(frozen=True)
class ImageSets:
    """One pipeline's images of several lists of captions.

    Attributes:
        scheduler: class name of the scheduler that they were sampled with.
        folders: of each list, a folder for each guidance scale.
    """

    scheduler: str
    folders: list[list[ImageFolder]]


def generate_image_sets(
    path: str,
    caption_lists: Sequence[Sequence[str]],
    samplings: Sequence[Sampling],
    root: Path,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    unet: str | None = None,
) -> ImageSets:
    """Generate the images of every list of captions with every sampling, except those that exist already.

    The folders are named by what the images depend on, so that equal lists share theirs. A pipeline is loaded only
    where an image is missing.

    Args:
        path: folder or Hub id of the pipeline.
        caption_lists: of the images; an image's noise depends on its place in its list.
        samplings: of one scheduler.
        root: folder of the folders; processes that were launched together all see it.
        dtype: as of `load_pipeline`.
        progress: whether to show progress bars.
        unet: folder or Hub id of a UNet or transformer in place of the pipeline's own.

    Raises:
        OSError, ValueError: as of `load_pipeline`, `ImageFolder` and `draw_images`.
    """
    state = process_state()
    scheduler = scheduler_name(path, samplings[0].scheduler)
    pipeline = None
    folders: list[list[ImageFolder]] = []
    for captions in caption_lists:
        folders.append([])
        for sampling in samplings:
            settings = _settings(path, captions, sampling, scheduler, dtype, unet)
            with state.main_process_first():
                folder = ImageFolder(root / f"{Path(unet or path).name}-{hash_of_settings(settings)[:8]}", settings)
                missing = folder.missing(len(captions))
            if missing:
                pipeline = pipeline or load_pipeline(path, samplings[0].scheduler, dtype, unet=unet)
                draw_images(pipeline, captions, sampling, folder, progress)
            folders[-1].append(folder)
    return ImageSets(scheduler, folders)


@contextmanager
def image_root(images: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Yield the folder for images: `images`, or where it is None a folder that is deleted afterwards.

    Raises:
        ValueError: there are several processes, and no folder that all of them see.
    """
    if images is not None:
        yield Path(images)
        return
    if process_state().num_processes > 1:
        raise ValueError("Several processes need a folder for the images that all of them see; give one (--images).")
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _settings(
    path: str, captions: Sequence[str], sampling: Sampling, scheduler: str, dtype: torch.dtype | None, unet: str | None
) -> dict[str, Any]:
    settings = {
        "files": hash_of_folder(path),
        "prompts": hash_of_text("\n".join(captions)),
        "scheduler": scheduler,
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "seed": sampling.seed,
        "device": default_device().type,
    }
    # Defaults are left out, as by earlier versions, so that their images remain valid.
    if unet is not None:
        settings |= {"unet": hash_of_folder(unet)}
    return settings if dtype is None else settings | {"dtype": str(dtype).removeprefix("torch.")}
