"""The command `bitsfusion app`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .sources import check_holds_something, config_folder


def launch_app(
    pipeline: Annotated[str, typer.Argument(help="Folder or Hub id of a pipeline in full precision.")],
    quantized: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or Hub id of a quantized pipeline, or of a UNet for PIPELINE; can be repeated; default: "
            "PIPELINE is rounded."
        ),
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Without --quantized: bits a weight to round to; default: 3.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt to click; can be repeated; default: none.")] = None,
    server_port: Annotated[int | None, typer.Option(help="Default: 7860, or the next free one.")] = None,
) -> None:
    """Show full precision beside quantized in the browser; needs the extra `app`."""
    if quantized and target_bits is not None:
        raise typer.BadParameter("--target-bits says how to round PIPELINE, which --quantized makes needless")
    for source in (pipeline, *(quantized or [])):
        check_holds_something(config_folder(source), source)

    try:
        from diffusers_bitsfusion.app.page import LAUNCH, build_app
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}. Install the app's packages: pip install diffusers_bitsfusion[app]") from error
    from diffusers_bitsfusion.app.models import fetch, quantize, refuse_quantized

    full = fetch(pipeline)
    refuse_quantized(full)
    with tempfile.TemporaryDirectory() as scratch:
        chosen = [fetch(source) for source in quantized or []]
        chosen = chosen or [quantize(full, Path(scratch, "rounded"), target_bits or 3.0)]
        page = build_app(full, *chosen, examples=prompt or ())
    page.launch(server_port=server_port, **LAUNCH)
