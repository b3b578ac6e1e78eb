"""The command `bitsfusion allocate`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import check_output, say, show
from .options import Json, Overwrite, TimeEmbedding
from .sources import model_config


def allocate(
    analysis: Annotated[Path, typer.Argument(help="Folder that `bitsfusion analyze` wrote, or its analysis.jsonl.")],
    out: Annotated[Path, typer.Option(help="JSON file to write the recipe to.")],
    target_bits: Annotated[float, typer.Option(help="Average bits a weight, by the paper's formula.")] = 1.99,
    max_bytes: Annotated[
        int | None,
        typer.Option(help="Instead: bytes of these layers in the file, entropy coded; default: by the bits."),
    ] = None,
    rule: Annotated[str, typer.Option(help='"knapsack", "paper" or "data-free".')] = "knapsack",
    eta: Annotated[float, typer.Option(help="Exponent of the size in the paper's rule.")] = 0.3,
    metric: Annotated[
        str | None,
        typer.Option(help='Stands for damage; "psnr": the geometric mean of the MSE. Default: mse.'),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a pipeline or model that the recipe must fit; default: unchecked."),
    ] = None,
    time_embedding: Annotated[
        TimeEmbedding | None,
        typer.Option(
            help='With --model: what `quantize` will be told, "table" for example, since it counts among the bits; '
            "default: as the analysis found it."
        ),
    ] = None,
    overwrite: Overwrite = False,
    json_file: Json = None,
) -> None:
    """Choose the bits of every layer from a finished analysis."""
    if time_embedding is not None and model is None:
        raise typer.BadParameter("--time-embedding needs --model, whose config says how large its time embedding is")
    check_output(out, overwrite)

    from diffusers_bitsfusion.analysis.allocate import Totals
    from diffusers_bitsfusion.analysis.allocate import allocate as run
    from diffusers_bitsfusion.analysis.results import Analysis

    loaded = Analysis.load(analysis)
    if model is not None:
        loaded = _checked(loaded, model, time_embedding)
    loaded = loaded if metric is None else loaded.by(metric)
    recipe = run(loaded, target_bits, rule=rule, max_bytes=max_bytes, eta=eta)
    recipe.save(out)
    totals = Totals.of(recipe, loaded)
    show(f"{recipe!r}\n{totals}", {"layers": dict(recipe)} | asdict(totals), json_file)
    if str(json_file) != "-":
        say(f"{out}")


def _checked(analysis: Any, source: str, time_embedding: str | None) -> Any:
    """Return the analysis of the model in `source`, with the time embedding as requested; no weights are loaded.

    Raises:
        ValueError: the analysis is of another model.
    """
    from diffusers_bitsfusion.analysis.study import analysed_layers, undecided_bits
    from diffusers_bitsfusion.reporting.size_prediction import model_from_config

    model = model_from_config(model_config(source))
    analysis.check_model({name: tuple(layer.weight.shape) for name, layer in analysed_layers(model).items()}, source)
    if time_embedding is None:
        return analysis
    fixed, weights = undecided_bits(model, time_embedding)
    return replace(analysis, header=replace(analysis.header, fixed_bits=fixed, weights=weights))
