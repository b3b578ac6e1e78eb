"""The command `bitsfusion analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import default_prompts, user_errors


def analyze(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a pipeline in full precision.")],
    out: Annotated[Path, typer.Option(help="Folder for the result; an interrupted analysis goes on from it.")],
    method: Annotated[
        str,
        typer.Option(help='"full", "calibrated", or an estimate: "prediction", "gradient", "output" or "weight".'),
    ] = "full",
    prompts: Annotated[
        Path | None,
        typer.Option(help="Tab-separated file with a Prompt column; default: prompts.tsv in the folder of SOURCE."),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a CLIP; default: clip/ in the folder of SOURCE.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Draw so many of the prompts, for every layer and n.")] = 16,
    steps: Annotated[int, typer.Option(help="Inference steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Of classifier-free guidance.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Base of the seeds of all images.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Images drawn at once.")] = 8,
    scheduler: Annotated[str | None, typer.Option(help="diffusers scheduler; default: the pipeline's own.")] = None,
    qat_steps: Annotated[int, typer.Option(help="Training steps of each layer at each n.")] = 10,
    learning_rate: Annotated[
        float, typer.Option(help="Of that training, as a fraction of the RMS of the layer's weights.")
    ] = 4e-3,
    calls: Annotated[int, typer.Option(help="Calls of the denoiser that estimates look at.")] = 8,
    lpips: Annotated[bool, typer.Option("--lpips", help="Measure LPIPS too; needs the package lpips.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write report.html into OUT; needs [plot].")] = False,
) -> None:
    """Measure how much it hurts to round each layer alone to 1, 2 and 3 bits.

    Shared out over processes by `accelerate launch -m diffusers_bitsfusion analyze ...`, on CPUs by `torchrun`.
    """
    with user_errors():
        from ..analysis.sensitivity import analyze as run
        from ..analysis.study import Settings
        from ..evaluation import Sampling, read_prompts, sample_prompts
        from ..utils.processes import process_state

        if report:
            from ..analysis.report_page import write_report  # a missing package shows now, not after hours
        captions = []
        if method != "weight":
            found = read_prompts(prompts or default_prompts(source))
            captions = [prompt.caption for prompt in sample_prompts(found, min(num_images, len(found)))]
        settings = Settings(
            qat_steps=qat_steps,
            learning_rate=learning_rate,
            calls=calls,
            sampling=Sampling(steps, guidance_scale, seed, batch_size, scheduler),
            lpips=lpips,
        )
        analysis = run(source, out, captions, method=method, settings=settings, clip=clip)
        if not process_state().is_main_process:
            return
        typer.echo(f"{len(analysis.header.layers)} layers at {len(analysis.header.bits)} numbers of bits: {out}")
        if report:
            write_report(analysis, out / "report.html")
            typer.echo(f"Report: {out / 'report.html'}")
