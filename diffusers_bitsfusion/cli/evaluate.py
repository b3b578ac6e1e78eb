"""The command `bitsfusion evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..utils.files import write_atomically
from .common import default_prompts, user_errors


def evaluate(
    path: Annotated[str, typer.Argument(help="Folder or Hub id of a pipeline, packed or in full precision.")],
    reference: Annotated[str | None, typer.Option(help="Full-precision pipeline to compare with.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Tab-separated file with a Prompt, optionally a Category and a Spec column; "
            "default: prompts.tsv in the folder of PATH or of the reference."
        ),
    ] = None,
    scorer: Annotated[str | None, typer.Option(help="MODULE:FUNCTION that judges images by their Spec.")] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a CLIP; default: clip/ in the folder of PATH or of the reference."),
    ] = None,
    num_images: Annotated[int | None, typer.Option(help="Draw so many of the prompts; default: all.")] = None,
    steps: Annotated[int, typer.Option(help="Inference steps.")] = 50,
    guidance_scale: Annotated[list[float] | None, typer.Option(help="Can be repeated.  [default: 7.5]")] = None,
    seed: Annotated[int, typer.Option(help="Base of the seeds of all images.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Images drawn at once; does not change them.")] = 8,
    scheduler: Annotated[str | None, typer.Option(help="diffusers scheduler; default: the pipeline's own.")] = None,
    lpips: Annotated[bool, typer.Option("--lpips", help="Measure LPIPS too; needs the package lpips.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    images: Annotated[Path | None, typer.Option(help="Keep the images here, and continue from them.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the scores into the card in PATH.")] = False,
) -> None:
    """Draw a prompt set and score the images: compositional score, CLIP score, distances to a reference."""
    with user_errors():
        from .. import evaluation
        from ..reporting.model_card import add_section, check_card

        if prompts is None:
            prompts = default_prompts(path, reference)
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)  # now, not after hours of drawing
        if card:
            check_card(Path(path))
        chosen = evaluation.sample_prompts(evaluation.read_prompts(prompts), num_images)
        report = evaluation.evaluate(
            path,
            chosen,
            reference=reference,
            scorer=None if scorer is None else evaluation.load_scorer(scorer),
            clip=clip,
            sampling=evaluation.Sampling(steps=steps, seed=seed, batch_size=batch_size, scheduler=scheduler),
            guidance_scales=guidance_scale or (),
            lpips=lpips,
            images=images,
        )
        typer.echo(evaluation.format_report(report))
        if card:
            add_section(Path(path), "Scores", f"```text\n{evaluation.format_report(report)}\n```")
        if json_file is not None:
            write_atomically(json_file, json.dumps(report, indent=2, allow_nan=False) + "\n")
