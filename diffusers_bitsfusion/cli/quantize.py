"""The command `bitsfusion quantize`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .common import check_output, say, show, show_progress
from .options import Device, Json, Overwrite, Revision, TimeEmbedding, Variant
from .sources import Source, refuse_destination, refuse_quantized


def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder or Hub id of a pipeline or model, or a single file.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    recipe: Annotated[str, typer.Option(help='"auto", a shipped name, a JSON file, a Hub id, or 1 to 8.')] = "auto",
    target_bits: Annotated[float, typer.Option(help="Average bits a weight that allocation aims at.")] = 1.99,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Instead, bytes of the model's weight file, or by --budget of its memory; default: no bound."
        ),
    ] = None,
    budget: Annotated[Literal["file", "memory"], typer.Option(help="What --max-bytes counts.")] = "file",
    time_embedding: TimeEmbedding = "auto",
    in_out_bits: Annotated[int, typer.Option(min=1, max=8, help="Bits of the first and last layer.")] = 8,
    not_convert: Annotated[
        list[str] | None,
        typer.Option(help="Module to leave as it is, by its name or a part of it; can be repeated; default: none."),
    ] = None,
    components: Annotated[
        list[str] | None,
        typer.Option(help="Component to quantize; can be repeated; default: the UNet or transformer."),
    ] = None,
    text_encoder_bits: Annotated[
        int | None, typer.Option(min=1, max=8, help="Bits of the text encoders; default: they stay as they are.")
    ] = None,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"],
        typer.Option(
            help="dtype of what stays in floating point in the files; a CPU calibrates and loads them in float32."
        ),
    ] = "float16",
    device: Device = None,
    variant: Variant = None,
    revision: Revision = None,
    config: Annotated[
        str | None,
        typer.Option(help="Of a single file: folder or Hub id of a pipeline with its configs; default: by its kind."),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Round for the inputs that layers see in sampling. What is done is kept in "
            "DST.calibration; after an interruption the same command continues from there.",
        ),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="For --calibrate: text file, a prompt a line, or *.tsv with a Prompt column; default: shipped ones."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="For --calibrate: images sampled; default: 16.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="For --calibrate: inference steps of each image; default: 20.")
    ] = None,
    tuning_steps: Annotated[
        int | None,
        typer.Option(help="For --calibrate: steps that tune scales, biases and norms after rounding; default: 0."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="For --calibrate: of prompts and noise; default: 0.")] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="For --calibrate: GB that it may take beside the pipeline; default: 8.")
    ] = None,
    overwrite: Overwrite = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO_ID", help="Push the result there as well; default: nowhere.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Quantize a pipeline or model and save it packed."""
    settings = {
        "num_samples": samples,
        "num_inference_steps": steps,
        "tuning_steps": tuning_steps,
        "seed": seed,
        "memory_gb": memory_gb,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    if (given or prompts is not None) and not calibrate:
        raise typer.BadParameter(
            "--prompts, --samples, --steps, --tuning-steps, --seed and --memory-gb are for --calibrate"
        )

    import torch

    from diffusers_bitsfusion import BitsFusionConfig, size_report

    options: dict[str, Any] = {
        "recipe": int(recipe) if recipe.isdecimal() else recipe,
        "target_bits": target_bits,
        "target_bytes": max_bytes,
        "budget": budget,
        "time_embedding": time_embedding,
        "in_out_bits": in_out_bits,
        "modules_to_not_convert": not_convert,
    }
    denoiser = BitsFusionConfig(**options | ({"components": components} if components else {}))
    refuse_destination(source, destination, denoiser.components)
    check_output(destination, overwrite)
    found = Source.find(source, revision=revision, variant=variant, config=config)
    configs = [denoiser, *_text_encoder_configs(found, denoiser.components, text_encoder_bits)]
    quantized = [name for part in configs for name in part.components]
    refuse_quantized(found.folder, quantized)
    calibration = _calibration(destination, prompts, given) if calibrate else None
    if push_to_hub is not None:
        _create_repository(push_to_hub)  # A token without write access is reported before the work.
    loaded = _quantize(found, configs, getattr(torch, dtype), device, calibration)
    loaded.save_pretrained(destination)
    if calibration is not None:
        shutil.rmtree(calibration.cache_dir)
    if push_to_hub is not None:
        loaded.push_to_hub(push_to_hub)
    report = size_report(destination)
    show(str(report), report.to_dict(), json_file)
    if str(json_file) != "-":
        if max_bytes is not None and budget == "file":
            say(_memory_line(loaded))
        say(_next_lines(found, loaded, destination, push_to_hub))


def _memory_line(loaded: Any) -> str:
    """Return what grids that were chosen for the file cost in memory."""
    from diffusers_bitsfusion import size_report

    report: Any = size_report(loaded)
    total = sum(part.total_bytes for part in getattr(report, "quantized", {"": report}).values())
    return f"\nIn memory {total / 1e6:.1f} MB: grids are as wide as the file allows. --budget memory bounds these."


def _text_encoder_configs(source: Source, components: list[str], bits: int | None) -> list[Any]:
    """Return the config of the pipeline's text encoders, where bits for them are given.

    Raises:
        ValueError: there are none, or they are among `components` already.
    """
    from diffusers_bitsfusion import BitsFusionConfig

    if bits is None:
        return []
    encoders = [name for name in source.components if name.startswith("text_encoder")]
    if not encoders:
        raise ValueError(f"{source.name} has no text encoder for --text-encoder-bits.")
    if set(encoders) & set(components):
        raise ValueError(f"{', '.join(encoders)}: name them by --components or give --text-encoder-bits, not both.")
    return [BitsFusionConfig(recipe=bits, components=encoders)]


def _calibration(destination: Path, prompts: Path | None, settings: dict[str, Any]) -> Any:
    from diffusers_bitsfusion import Calibration
    from diffusers_bitsfusion.evaluation import read_captions

    captions = None if prompts is None else read_captions(prompts)
    return Calibration(captions, cache_dir=f"{destination}.calibration", **settings)


def _create_repository(repo_id: str) -> None:
    from huggingface_hub import create_repo

    from diffusers_bitsfusion.utils.hub import explaining_refusals

    with explaining_refusals(repo_id):
        create_repo(repo_id, exist_ok=True)


def _quantize(source: Source, configs: list[Any], dtype: Any, device: str | None, calibration: Any) -> Any:
    if calibration is None:
        return _quantize_while_loading(source, configs, dtype, device)
    return _quantize_calibrated(source, configs, dtype, device, calibration)


def _quantize_while_loading(source: Source, configs: list[Any], dtype: Any, device: str | None) -> Any:
    from diffusers import PipelineQuantizationConfig

    placed = {} if device in (None, "cpu") else {"device_map": device}
    config = configs[0]
    if len(configs) > 1:
        mapping: dict[str, Any] = {}
        for part in configs:  # The default components are alternatives, of which the pipeline has one.
            names = part.components_to_quantize or [name for name in part.components if name in source.components]
            mapping |= dict.fromkeys(names, part)
        config = PipelineQuantizationConfig(quant_mapping=mapping)
    return source.load(quantization_config=config, dtype=dtype, **placed)


def _quantize_calibrated(source: Source, configs: list[Any], dtype: Any, device: str | None, calibration: Any) -> Any:
    """Quantize by calibration, which all processes share; only the first one returns."""
    import torch

    from diffusers_bitsfusion import quantize_model
    from diffusers_bitsfusion.utils.processes import process_state

    state = process_state()
    pipeline = source.load(dtype=dtype)
    place = state.device if device is None else torch.device(device)
    if not source.is_model:  # Calibration refuses a model alone, with a message of its own.
        # A CPU computes in float16 as well, though diffusers warns that it does not.
        pipeline.to(place, silence_dtype_warnings=True)
    progress = {} if show_progress() else {"progress": False}
    for config, run in zip(configs, (calibration, None), strict=False):
        quantize_model(pipeline, config, calibration=run, **progress)
    state.wait_for_everyone()
    if not state.is_main_process:
        raise typer.Exit()
    return pipeline


def _next_lines(source: Source, loaded: Any, destination: Path, repo_id: str | None) -> str:
    """Return where the result is saved, its size, and how to load it and generate images with it."""
    size = sum(file.stat().st_size for file in destination.rglob("*") if file.is_file())
    name = type(loaded).__name__
    lines = [f"\nSaved {name} in {destination} ({size / 1e6:.1f} MB in all)."]
    if repo_id is not None:
        lines.append(f"Pushed to https://huggingface.co/{repo_id}")
    place = repo_id or str(destination)
    if source.is_model:
        lines += ["Load it:", "", f"    import diffusers_bitsfusion; from diffusers import {name}"]
        lines += [f'    model = {name}.from_pretrained("{place}")']
    else:
        lines += ["Generate images with it by `bitsfusion draw`, or in Python:", ""]
        lines += ["    import diffusers_bitsfusion, diffusers"]
        lines += [f'    pipe = diffusers.DiffusionPipeline.from_pretrained("{place}")']
        lines += ['    pipe("a red circle").images[0].save("image.png")']
    return "\n".join(lines)
