"""The command `bitsfusion export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import check_output, show
from .options import Json, Overwrite, Revision, Variant
from .sources import Source, check_holds_something, config_folder


def export(
    path: Annotated[str, typer.Argument(metavar="DST", help="Folder or Hub id of a packed pipeline.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    to: Annotated[Literal["openvino"], typer.Option(help="Engine that runs the result.")],
    unet: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a UNet in place of the pipeline's; default: its own.")
    ] = None,
    variant: Variant = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    json_file: Json = None,
) -> None:
    """Write a packed pipeline as models of another engine, with weights of two, four and eight bits."""
    check_output(out, overwrite)
    source = Source.find(path, revision=revision, variant=variant)
    if source.is_model:
        raise ValueError(f"{path} is a model alone. Name its pipeline, and give the model by --unet {path}.")

    import torch

    from diffusers_bitsfusion.evaluation.pipeline import replace_denoiser
    from diffusers_bitsfusion.export import export_openvino

    pipeline = source.load(dtype=torch.float32)
    if unet is not None:
        check_holds_something(config_folder(unet), unet)
        replace_denoiser(pipeline, unet, torch.float32)
    export_openvino(pipeline, out)
    sizes = {str(file.parent.relative_to(out)): file.stat().st_size for file in sorted(out.glob("*/*.bin"))}
    lines = [f"{name}: {size / 1e6:.1f} MB" for name, size in sizes.items()]
    text = "\n".join([*lines, "", "Generate images with it by optimum-intel:", "", *_python(out)])
    show(text, {"folder": str(out), "to": to, "bytes": sizes}, json_file)


def _python(folder: Path) -> list[str]:
    return [
        "    from optimum.intel import OVStableDiffusionPipeline",
        f'    pipe = OVStableDiffusionPipeline.from_pretrained("{folder}")',
        '    pipe("a red circle").images[0].save("image.png")',
    ]
