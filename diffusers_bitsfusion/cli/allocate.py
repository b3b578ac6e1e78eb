"""The command `bitsfusion allocate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import config_folder, is_model, read_config, user_errors


def allocate(
    analysis: Annotated[Path, typer.Argument(help="Folder that `bitsfusion analyze` wrote, or its analysis.jsonl.")],
    out: Annotated[Path, typer.Option(help="JSON file to write the recipe to.")],
    target_bits: Annotated[float, typer.Option(help="Average bits a weight, by the paper's formula.")] = 1.99,
    max_bytes: Annotated[
        int | None, typer.Option(help="Instead: bytes of these layers in the file, entropy coded.")
    ] = None,
    rule: Annotated[str, typer.Option(help='"knapsack", "paper" or "data-free".')] = "knapsack",
    eta: Annotated[float, typer.Option(help="Exponent of the size in the paper's rule.")] = 0.3,
    metric: Annotated[
        str | None,
        typer.Option(help='Stands for damage; "psnr": the geometric mean of the MSE. Default: mse.'),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a pipeline or model that the recipe must fit.")
    ] = None,
) -> None:
    """Choose the bits of every layer from a finished analysis."""
    with user_errors():
        from ..analysis.allocate import Totals
        from ..analysis.allocate import allocate as run
        from ..analysis.results import Analysis

        loaded = Analysis.load(analysis)
        if model is not None:
            loaded.check_model(_shapes(model), model)
        loaded = loaded if metric is None else loaded.by(metric)
        recipe = run(loaded, target_bits, rule=rule, max_bytes=max_bytes, eta=eta)
        out.parent.mkdir(parents=True, exist_ok=True)
        recipe.save(out)
        typer.echo(f"{recipe!r}\n{Totals.of(recipe, loaded)}\n{out}")


def _shapes(source: str) -> dict[str, tuple[int, ...]]:
    """Weight shapes of the layers of a pipeline's denoiser, or of a model, that a recipe decides; loads no weights."""
    import diffusers
    from accelerate import init_empty_weights

    from ..analysis.study import analysed_layers
    from ..evaluation import DENOISERS

    place = {}
    folder = config_folder(source)
    if not is_model(folder):
        index = read_config(folder / "model_index.json")
        place["subfolder"] = next((name for name in DENOISERS if (index.get(name) or [None])[0]), "unet")
    config = diffusers.UNet2DConditionModel.load_config(folder, **place)  # any class reads any config
    with init_empty_weights():
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    return {name: tuple(layer.weight.shape) for name, layer in analysed_layers(model).items()}
