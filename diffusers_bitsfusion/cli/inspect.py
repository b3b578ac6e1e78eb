"""The command `bitsfusion inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import say, show
from .options import Json, Revision, TimeEmbedding
from .sources import config_folder, model_config


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="Folder of a quantized model or pipeline; with --plan a folder, a Hub id or a config.json of one "
            "that is not quantized."
        ),
    ],
    plan: Annotated[bool, typer.Option("--plan", help="Predict the size of the file, from a config alone.")] = False,
    recipe: Annotated[
        str | None,
        typer.Option(help='With --plan: "auto", a shipped name, a JSON file, a Hub id, or 1 to 8; default: "auto".'),
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="With --plan: average bits a weight; default: 1.99.")
    ] = None,
    time_embedding: Annotated[
        TimeEmbedding | None, typer.Option(help='With --plan: "auto", "table", "cache" or "keep"; default: "auto".')
    ] = None,
    in_out_bits: Annotated[
        int | None, typer.Option(min=1, max=8, help="With --plan: bits of the first and last layer; default: 8.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of a folder or Hub id, and compare counts, values, checksums.")
    ] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Finish saves into the folder that were killed.")] = False,
    revision: Revision = None,
    json_file: Json = None,
) -> None:
    """Print where the bytes are, bits a weight by each convention, and the histogram of bits."""
    asked: dict[str, Any] = {
        "recipe": int(recipe) if recipe is not None and recipe.isdecimal() else recipe,
        "target_bits": target_bits,
        "time_embedding": time_embedding,
        "in_out_bits": in_out_bits,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if given and not plan:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise typer.BadParameter(f"{options}: only with --plan; what is quantized already is as it is")
    if plan and (verify or repair):
        raise typer.BadParameter("--verify and --repair are for what is quantized, --plan for what is not")

    from diffusers_bitsfusion import BitsFusionConfig, size_report
    from diffusers_bitsfusion.integrations.folder_commit import repair as finish_saves
    from diffusers_bitsfusion.reporting.size_prediction import model_from_config, predict_size
    from diffusers_bitsfusion.reporting.verification import verify_checkpoint

    if repair:
        say(f"{finish_saves(Path(path))} saves finished in {path}.")

    report: Any
    if verify:
        report = verify_checkpoint(path)
    elif plan:
        report = predict_size(model_from_config(model_config(path, revision)), BitsFusionConfig(**given))
    else:
        report = size_report(config_folder(path, revision, weights=True))
    show(str(report), report.to_dict(), json_file)
