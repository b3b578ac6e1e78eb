"""The command line `bitsfusion`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli_analysis
from .cli_common import config_folder, default_prompts, is_model, read_config, refuse_quantized, user_errors

app = typer.Typer(
    name="bitsfusion",
    help="Extremely low-bit diffusion models for diffusers.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)

_DTYPES = ("float16", "bfloat16", "float32")


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a pipeline or a model.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    recipe: Annotated[str, typer.Option(help='"auto", a shipped name, a JSON file, a Hub id, or 1 to 8.')] = "auto",
    target_bits: Annotated[float, typer.Option(help="Average bits a weight that allocation aims at.")] = 1.99,
    time_embedding: Annotated[str, typer.Option(help='"auto", "table", "cache" or "keep".')] = "auto",
    dtype: Annotated[str, typer.Option(help="dtype of what stays in floating point.")] = "float16",
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Round for the inputs that layers see while the pipeline draws. What is done is kept in "
            "DST.calibration; after an interruption the same command goes on from there.",
        ),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="For --calibrate: a prompt a line, or a tab-separated file with a Prompt column."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="For --calibrate: pictures drawn.  [default: 16]")] = None,
    steps: Annotated[
        int | None, typer.Option(help="For --calibrate: inference steps of each picture.  [default: 20]")
    ] = None,
    tuning_steps: Annotated[
        int | None,
        typer.Option(help="For --calibrate: steps that tune scales, biases and norms after rounding.  [default: 0]"),
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="For --calibrate: GB that it may take beside the pipeline.  [default: 8]")
    ] = None,
) -> None:
    """Quantize a pipeline or model and save it packed."""
    import torch

    from . import BitsFusionConfig, size_report

    if dtype not in _DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(_DTYPES)}", param_hint="--dtype")
    settings = {
        "num_samples": samples,
        "num_inference_steps": steps,
        "tuning_steps": tuning_steps,
        "memory_gb": memory_gb,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    if (given or prompts is not None) and not calibrate:
        raise typer.BadParameter("--prompts, --samples, --steps, --tuning-steps and --memory-gb are for --calibrate")
    with user_errors():
        config = BitsFusionConfig(
            recipe=int(recipe) if recipe.isdecimal() else recipe,
            target_bits=target_bits,
            time_embedding=time_embedding,
        )
        if calibrate:
            calibration = _calibration(destination, prompts, given)
            _quantize_calibrated(source, destination, config, getattr(torch, dtype), calibration)
        else:
            loaded = _load(source, config.components, quantization_config=config, dtype=getattr(torch, dtype))
            loaded.save_pretrained(destination)
        typer.echo(str(size_report(destination)))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a quantized model or pipeline; with --plan, a config.json.")],
    plan: Annotated[bool, typer.Option("--plan", help="Predict the size of the file, from a config alone.")] = False,
    target_bits: Annotated[float, typer.Option(help="With --plan: average bits a weight.")] = 1.99,
    time_embedding: Annotated[str, typer.Option(help='With --plan: "auto", "table", "cache" or "keep".')] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print where the bytes are, bits a weight by each convention, and the histogram of bits."""
    from . import BitsFusionConfig, size_report
    from .accounting import PipelineSizeReport, SizeReport

    with user_errors():
        report: SizeReport | PipelineSizeReport
        if plan:
            from .prediction import model_from_config, predict_size

            config = BitsFusionConfig(target_bits=target_bits, time_embedding=time_embedding)
            report = predict_size(model_from_config(path), config)
        else:
            report = size_report(path)
        typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))


@app.command()
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
        from . import evaluation
        from .card import add_section, check_card

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
            json_file.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@app.command()
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
        from .evaluation import Sampling, generate_images, image_grid, load_pipeline, read_prompts, sample_prompts
        from .evaluation.grid import distinct_labels

        out.parent.mkdir(parents=True, exist_ok=True)
        found = read_prompts(prompts)
        captions = [prompt.caption for prompt in sample_prompts(found, min(num_images, len(found)))]
        sampling = Sampling(steps, guidance_scale, seed, batch_size)
        columns = [generate_images(load_pipeline(path), captions, sampling) for path in paths]
        image_grid(columns, distinct_labels(paths), captions).save(out, format="PNG")
        typer.echo(f"{len(captions)} prompts by {len(paths)} pipelines: {out}")


app.command()(cli_analysis.analyze)
app.command()(cli_analysis.allocate)


def _calibration(destination: Path, prompts: Path | None, settings: dict[str, Any]):
    from . import Calibration
    from .evaluation import read_captions

    captions = None if prompts is None else read_captions(prompts)
    return Calibration(captions, cache_dir=f"{destination}.calibration", **settings)


def _quantize_calibrated(source: str, destination: Path, config, dtype, calibration) -> None:
    """Under `accelerate launch`, every process does its share, and the first one saves."""
    from . import quantize_model
    from .processes import process_state

    state = process_state()
    pipeline = _load(source, config.components, dtype=dtype).to(state.device)
    quantize_model(pipeline, config, calibration=calibration)
    if state.is_main_process:
        pipeline.save_pretrained(destination)
        shutil.rmtree(f"{destination}.calibration")
    state.wait_for_everyone()
    if not state.is_main_process:
        raise typer.Exit()


def _load(source: str, components: Iterable[str], **kwargs):
    """A pipeline, or where `source` holds a model, that model by the class its config names; not quantized yet."""
    import diffusers

    folder = config_folder(source)
    refuse_quantized(folder, components)
    if not is_model(folder):
        return diffusers.DiffusionPipeline.from_pretrained(source, **kwargs)
    name = read_config(folder / "config.json").get("_class_name")
    if not name or not hasattr(diffusers, name):
        raise ValueError(f"{folder / 'config.json'} names no diffusers class (_class_name is {name!r}).")
    return getattr(diffusers, name).from_pretrained(source, **kwargs)
