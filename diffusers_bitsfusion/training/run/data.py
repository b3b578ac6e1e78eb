"""Training data of a run."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from ...config.calibration import Calibration
from ...evaluation import read_captions
from ...utils.timesteps import TimestepDistribution
from ..batches import Batches, ImageBatches, Sharing
from ..generated_latents import GeneratedBatches
from ..images import TrainingImages, open_images
from ..prompt_embeddings import TextEncoder


def open_training_images(args: argparse.Namespace, teacher: DiffusionPipeline) -> TrainingImages | None:
    """Return the captioned images that the command line names, if any, cropped to the pipeline's resolution."""
    if args.dataset_name is None and args.train_data_dir is None:
        return None
    source = open_images(
        args.dataset_name,
        args.train_data_dir,
        dataset_config_name=args.dataset_config_name,
        image_column=args.image_column,
        caption_column=args.caption_column,
        cache_dir=args.cache_dir,
    )
    return TrainingImages(
        source, _resolution(args, teacher), args.center_crop, args.random_flip, args.max_train_samples
    )


def calibration_prompts(args: argparse.Namespace, images: TrainingImages | None) -> list[str]:
    """Return the prompts of calibration: those of the command line, else captions of the images."""
    if args.prompts is not None:
        return read_captions(args.prompts)
    assert images is not None
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(images), generator=generator)[: Calibration.num_samples]
    return [images.load(int(index), generator)["caption"] for index in chosen]


def make_batches(
    args: argparse.Namespace,
    stage: int,
    images: TrainingImages | None,
    teacher: DiffusionPipeline,
    text: TextEncoder,
    scheduler: SchedulerMixin,
    distribution: TimestepDistribution,
    sharing: Sharing,
) -> Batches:
    """Return the batches of a stage: latents of the teacher in Stage I where there are prompts, else images."""
    common: dict[str, Any] = {
        "text_dropout": args.proportion_empty_prompts,
        "seed": 2 * args.seed + stage - 1,  # No two stages of any seeds share their noise.
        "device": teacher.device,
    }
    if stage == 1 and args.prompts is not None:
        side = _resolution(args, teacher) // teacher.vae_scale_factor
        return GeneratedBatches(
            read_captions(args.prompts),
            teacher.unet,
            text,
            scheduler,
            distribution,
            sharing,
            (teacher.unet.config.in_channels, side, side),
            num_inference_steps=args.drawing_steps,
            guidance_scale=args.guidance_scale,
            renewed_every=args.redraw_every,
            **common,
        )
    assert images is not None
    workers = args.dataloader_num_workers
    return ImageBatches(images, teacher.vae, text, scheduler, distribution, sharing, num_workers=workers, **common)


def _resolution(args: argparse.Namespace, teacher: DiffusionPipeline) -> int:
    resolution: int = args.resolution or teacher.unet.config.sample_size * teacher.vae_scale_factor
    return resolution
