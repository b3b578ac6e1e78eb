"""The command `bitsfusion compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import user_errors


def compare(
    paths: Annotated[list[str], typer.Argument(metavar="A B...", help="Folders or Hub ids of pipelines.")],
    prompts: Annotated[Path, typer.Option(help="Tab-separated file with a Prompt column.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    num_images: Annotated[int, typer.Option(help="Rows at most.")] = 8,
    steps: Annotated[int, typer.Option(help="Inference steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Of classifier-free guidance.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Base of the seeds of all images.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Images drawn at once; does not change them.")] = 8,
) -> None:
    """Draw the same prompts with several pipelines and put the images in one labelled grid."""
    with user_errors():
        from ..evaluation import Sampling, generate_images, image_grid, load_pipeline, read_prompts, sample_prompts
        from ..evaluation.grid import distinct_labels

        out.parent.mkdir(parents=True, exist_ok=True)
        found = read_prompts(prompts)
        captions = [prompt.caption for prompt in sample_prompts(found, min(num_images, len(found)))]
        sampling = Sampling(steps, guidance_scale, seed, batch_size)
        columns = [generate_images(load_pipeline(path), captions, sampling) for path in paths]
        image_grid(columns, distinct_labels(paths), captions).save(out, format="PNG")
        typer.echo(f"{len(captions)} prompts by {len(paths)} pipelines: {out}")
