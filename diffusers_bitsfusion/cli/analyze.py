"""The command `bitsfusion analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import default_prompts, say, show, show_progress
from .options import BatchSize, GuidanceScale, Json, Scheduler, Seed, Steps
from .sources import check_holds_something, config_folder


def analyze(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a pipeline in full precision.")],
    out: Annotated[Path, typer.Option(help="Folder for the result; an interrupted analysis goes on from it.")],
    method: Annotated[
        str,
        typer.Option(help='"full", "calibrated", or an estimate: "prediction", "gradient", "output" or "weight".'),
    ] = "full",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file with a prompt a line, or *.tsv with a Prompt column; default: prompts.tsv in SOURCE."
        ),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a CLIP; default: clip/ in the folder of SOURCE.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Draw so many of the prompts, for every layer and n.")] = 16,
    steps: Steps = 20,
    guidance_scale: GuidanceScale = 7.5,
    seed: Seed = 1024,
    batch_size: BatchSize = 8,
    scheduler: Scheduler = None,
    qat_steps: Annotated[int, typer.Option(help="Training steps of each layer at each n.")] = 10,
    learning_rate: Annotated[
        float, typer.Option(help="Of that training, as a fraction of the RMS of the layer's weights.")
    ] = 4e-3,
    calls: Annotated[int, typer.Option(help="Calls of the denoiser that estimates look at.")] = 8,
    lpips: Annotated[bool, typer.Option("--lpips", help="Measure LPIPS too; needs the package lpips.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write report.html into OUT; needs [plot].")] = False,
    json_file: Json = None,
) -> None:
    """Measure how much it hurts to round each layer alone to 1, 2 and 3 bits.

    Shared out over processes by `accelerate launch -m diffusers_bitsfusion analyze ...`, on CPUs by `torchrun`.
    """
    from diffusers_bitsfusion.analysis.sensitivity import analyze as run
    from diffusers_bitsfusion.analysis.study import Settings
    from diffusers_bitsfusion.evaluation import Sampling, read_prompts, sample_prompts
    from diffusers_bitsfusion.utils.processes import process_state

    if report:
        from diffusers_bitsfusion.analysis.report_page import (
            write_report,  # a missing package shows now, not after hours
        )
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
    check_holds_something(config_folder(source), source)
    analysis = run(source, out, captions, method=method, settings=settings, clip=clip, progress=show_progress())
    if not process_state().is_main_process:
        return
    header = analysis.header
    text = f"{len(header.layers)} layers at {len(header.bits)} numbers of bits: {out}"
    show(text, {"layers": len(header.layers), "bits": header.bits, "folder": str(out)}, json_file)
    if report:
        write_report(analysis, out / "report.html")
        say(f"Report: {out / 'report.html'}")
    say(f"Next: bitsfusion allocate {out} --out recipe.json --model {source}")
