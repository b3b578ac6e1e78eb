"""The command `bitsfusion inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import user_errors


def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a quantized model or pipeline; with --plan, a config.json.")],
    plan: Annotated[bool, typer.Option("--plan", help="Predict the size of the file, from a config alone.")] = False,
    target_bits: Annotated[float, typer.Option(help="With --plan: average bits a weight.")] = 1.99,
    time_embedding: Annotated[str, typer.Option(help='With --plan: "auto", "table", "cache" or "keep".')] = "auto",
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of a folder or Hub id, and compare counts, values, checksums.")
    ] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Finish saves into the folder that were killed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print where the bytes are, bits a weight by each convention, and the histogram of bits."""
    from .. import BitsFusionConfig, size_report
    from ..reporting.size_report import PipelineSizeReport, SizeReport
    from ..reporting.verification import Verification, verify_checkpoint

    with user_errors():
        report: SizeReport | PipelineSizeReport | Verification
        if repair:
            from ..integrations.folder_commit import repair as finish_saves

            typer.echo(f"{finish_saves(path)} saves finished in {path}.", err=True)
        if verify:
            report = verify_checkpoint(path)
        elif plan:
            from ..reporting.size_prediction import model_from_config, predict_size

            config = BitsFusionConfig(target_bits=target_bits, time_embedding=time_embedding)
            report = predict_size(model_from_config(path), config)
        else:
            report = size_report(path)
        typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
