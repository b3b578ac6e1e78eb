"""The command `bitsfusion quantize`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import config_folder, is_model, read_config, refuse_destination, refuse_quantized, user_errors

_DTYPES = ("float16", "bfloat16", "float32")


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

    from .. import BitsFusionConfig, size_report

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
        refuse_destination(source, destination, config.components)
        if calibrate:
            calibration = _calibration(destination, prompts, given)
            _quantize_calibrated(source, destination, config, getattr(torch, dtype), calibration)
        else:
            loaded = _load(source, config.components, quantization_config=config, dtype=getattr(torch, dtype))
            loaded.save_pretrained(destination)
        typer.echo(str(size_report(destination)))


def _calibration(destination: Path, prompts: Path | None, settings: dict[str, Any]):
    from .. import Calibration
    from ..evaluation import read_captions

    captions = None if prompts is None else read_captions(prompts)
    return Calibration(captions, cache_dir=f"{destination}.calibration", **settings)


def _quantize_calibrated(source: str, destination: Path, config, dtype, calibration) -> None:
    """Under `accelerate launch`, every process does its share, and the first one saves."""
    from .. import quantize_model
    from ..utils.processes import process_state

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
