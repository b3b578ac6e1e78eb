"""The command `bitsfusion draw`, which generates one image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import check_output, show, show_progress
from .options import Device, Dtype, Json, Overwrite, Revision, Variant
from .sources import Source, check_holds_something, config_folder


def draw(
    path: Annotated[str, typer.Argument(help="Folder or Hub id of a pipeline, packed or in full precision.")],
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="Picture to write.")],
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw; default: nothing.")] = None,
    unet: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a UNet or transformer in place of the pipeline's; default: its own."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Inference steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Of classifier-free guidance.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Of the noise that the picture starts from.")] = 0,
    height: Annotated[int | None, typer.Option(help="In pixels; default: the pipeline's own.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels; default: the pipeline's own.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    variant: Variant = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    json_file: Json = None,
) -> None:
    """Draw one picture of a prompt."""
    check_output(out, overwrite)
    check_picture_name(out)
    source = Source.find(path, revision=revision, variant=variant)
    if source.is_model:
        raise ValueError(f"{path} is a model alone. Name its pipeline, and give the model by --unet {path}.")

    import torch

    from diffusers_bitsfusion.evaluation.pipeline import default_device, default_dtype, replace_denoiser

    place = default_device() if device is None else torch.device(device)
    kind = default_dtype(place) if dtype == "auto" else getattr(torch, dtype)
    pipeline = source.load(dtype=kind)
    if unet is not None:
        check_holds_something(config_folder(unet), unet)
        replace_denoiser(pipeline, unet, kind)
    pipeline.to(place, silence_dtype_warnings=True)
    pipeline.set_progress_bar_config(disable=not show_progress())
    call: dict[str, Any] = {"negative_prompt": negative_prompt, "height": height, "width": width}
    call = {name: value for name, value in call.items() if value is not None}
    image = pipeline(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        **call,
    ).images[0]
    image.save(out)
    show(str(out), {"picture": str(out), "prompt": prompt, "seed": seed, "steps": steps}, json_file)


def check_picture_name(file: Path) -> None:
    """Refuse a name whose ending is no kind of picture, before anything is drawn.

    Raises:
        ValueError: it is none.
    """
    from PIL import Image

    if file.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{file} does not end like a picture: .png, .jpg or .webp for example.")
