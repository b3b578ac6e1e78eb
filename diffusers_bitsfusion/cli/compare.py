"""The command `bitsfusion compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import check_output, show, show_progress
from .draw import check_picture_name
from .options import BatchSize, Device, Dtype, GuidanceScale, Json, Overwrite, PromptFile, Scheduler, Seed, Steps
from .sources import config_folder, is_model


def compare(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            help="Folders or Hub ids of pipelines; from the second on also of a UNet or transformer alone, drawn "
            "within the first pipeline.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Picture to write.")],
    prompts: PromptFile = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Instead of a file: a prompt; can be repeated; default: none.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Rows at most.")] = 8,
    steps: Steps = 50,
    guidance_scale: GuidanceScale = 7.5,
    seed: Seed = 1024,
    batch_size: BatchSize = 8,
    scheduler: Scheduler = None,
    dtype: Dtype = "auto",
    device: Device = None,
    overwrite: Overwrite = False,
    json_file: Json = None,
) -> None:
    """Draw the same prompts with several pipelines and put the images in one labelled grid."""
    if (prompts is None) == (not prompt):
        raise typer.BadParameter("give either a file of --prompts or a --prompt")
    check_output(out, overwrite)
    check_picture_name(out)

    import torch

    from diffusers_bitsfusion.evaluation import Sampling, generate_images, image_grid, load_pipeline, sample_prompts
    from diffusers_bitsfusion.evaluation.grid import distinct_labels
    from diffusers_bitsfusion.evaluation.pipeline import check_pipeline
    from diffusers_bitsfusion.evaluation.prompts import Prompt, read_prompts
    from diffusers_bitsfusion.reporting.summary import describe_denoiser

    found = read_prompts(prompts) if prompts is not None else [Prompt(text) for text in prompt or []]
    captions = [each.caption for each in sample_prompts(found, min(num_images, len(found)))]
    sampling = Sampling(steps, guidance_scale, seed, batch_size, scheduler)
    # All of them are looked at before the first is drawn.
    pipelines = [(paths[0], path) if is_model(config_folder(path)) else (path, None) for path in paths]
    for pipeline, _ in pipelines:
        check_pipeline(pipeline)
    kind = None if dtype == "auto" else getattr(torch, dtype)
    columns, labels = [], []
    for (pipeline, unet), label in zip(pipelines, distinct_labels(paths), strict=True):
        loaded = load_pipeline(pipeline, scheduler, kind, device=device, unet=unet)
        columns.append(generate_images(loaded, captions, sampling, progress=show_progress()))
        labels.append(f"{label}: {describe_denoiser(loaded)}")
    image_grid(columns, labels, captions).save(out)
    text = f"{len(captions)} prompts by {len(paths)} pipelines: {out}"
    show(text, {"picture": str(out), "prompts": captions, "columns": labels}, json_file)
