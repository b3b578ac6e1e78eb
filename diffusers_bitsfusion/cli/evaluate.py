"""The command `bitsfusion evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import default_prompts, show, user_errors
from .options import Json
from .sources import config_folder


def evaluate(
    path: Annotated[str, typer.Argument(help="Folder or Hub id of a pipeline, packed or in full precision.")],
    reference: Annotated[
        str | None, typer.Option(help="Full-precision pipeline to compare with; default: none.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file with a prompt a line, or *.tsv with a Prompt, optionally a Category and a Spec column; "
            "default: prompts.tsv in the folder of PATH or of the reference."
        ),
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(help="MODULE:FUNCTION that judges images by their Spec; default: none.")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a CLIP; default: clip/ in the folder of PATH or of the reference."),
    ] = None,
    num_images: Annotated[int | None, typer.Option(help="Draw so many of the prompts; default: all.")] = None,
    steps: Annotated[int, typer.Option(help="Inference steps.")] = 50,
    guidance_scale: Annotated[list[float] | None, typer.Option(help="Can be repeated; default: 7.5.")] = None,
    seed: Annotated[int, typer.Option(help="Base of the seeds of all images.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Images drawn at once; does not change them.")] = 8,
    scheduler: Annotated[str | None, typer.Option(help="diffusers scheduler; default: the pipeline's own.")] = None,
    lpips: Annotated[bool, typer.Option("--lpips", help="Measure LPIPS too; needs the package lpips.")] = False,
    json_file: Json = None,
    images: Annotated[
        Path | None, typer.Option(help="Keep the images here, and continue from them; default: nowhere.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the scores into the card in PATH.")] = False,
) -> None:
    """Draw a prompt set and score the images: compositional score, CLIP score, distances to a reference."""
    with user_errors():
        from diffusers_bitsfusion import evaluation
        from diffusers_bitsfusion.reporting.model_card import add_section, check_card

        config_folder(path)  # which names a folder or model that is not there
        if prompts is None:
            prompts = default_prompts(path, reference)
        if json_file is not None and str(json_file) != "-":
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
        show(evaluation.format_report(report), report, json_file)
        if card:
            add_section(Path(path), "Scores", f"```text\n{evaluation.format_report(report)}\n```")
