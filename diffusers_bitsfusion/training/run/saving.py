"""The trained pipeline: packed, saved in OUTPUT_DIR, described on its card, and pushed."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from huggingface_hub import ModelCard

from ...qat import convert
from ...reporting.model_card import add_section
from ...reporting.size_report import size_report
from ...utils.hub import explaining_refusals


def save_pipeline(
    args: argparse.Namespace,
    student: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    description: str | None,
    hub: dict[str, Any],
) -> None:
    """Save the source pipeline with the trained UNet in `args.output_dir`, and push it where requested.

    Args:
        args: arguments of the run.
        student: trained UNet, on the CPU.
        scheduler: scheduler of the pipeline.
        description: text for the model card; None for a UNet in full precision, which is not packed either.
        hub: `repo_id` and `token` to push to.
    """
    is_packed, folder = description is not None, Path(args.output_dir)
    pipeline = DiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        unet=convert(student, dtype=torch.float16) if is_packed else student.to(torch.float16),
        scheduler=scheduler,
        dtype=torch.float16,
    )
    pipeline.save_pretrained(folder)
    if description is not None:
        add_section(folder, "Training", description)
        print(size_report(folder / "unet"))
    if args.push_to_hub:
        _push(pipeline, description, hub)


def _push(pipeline: DiffusionPipeline, description: str | None, hub: dict[str, Any]) -> None:
    """Push the pipeline from a temporary folder, since OUTPUT_DIR holds checkpoints and logs as well."""
    with explaining_refusals(hub["repo_id"]), tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder, push_to_hub=True, **hub)
        if description is not None:
            add_section(Path(folder), "Training", description)
            ModelCard.load(Path(folder) / "README.md").push_to_hub(**hub)
