"""The commands `bitsfusion analyze` and `bitsfusion allocate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_common import config_folder, default_prompts, is_model, read_config, user_errors


def analyze(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a pipeline in full precision.")],
    out: Annotated[Path, typer.Option(help="Folder for the result; an interrupted analysis goes on from it.")],
    method: Annotated[
        str,
        typer.Option(help='"full", "calibrated", or an estimate: "prediction", "gradient", "output" or "weight".'),
    ] = "full",
    prompts: Annotated[
        Path | None,
        typer.Option(help="Tab-separated file with a Prompt column; default: prompts.tsv in the folder of SOURCE."),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a CLIP; default: clip/ in the folder of SOURCE.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Draw so many of the prompts, for every layer and n.")] = 16,
    steps: Annotated[int, typer.Option(help="Inference steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Of classifier-free guidance.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Base of the seeds of all images.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Images drawn at once.")] = 8,
    scheduler: Annotated[str | None, typer.Option(help="diffusers scheduler; default: the pipeline's own.")] = None,
    qat_steps: Annotated[int, typer.Option(help="Training steps of each layer at each n.")] = 10,
    learning_rate: Annotated[
        float, typer.Option(help="Of that training, as a fraction of the RMS of the layer's weights.")
    ] = 4e-3,
    calls: Annotated[int, typer.Option(help="Calls of the denoiser that estimates look at.")] = 8,
    lpips: Annotated[bool, typer.Option("--lpips", help="Measure LPIPS too; needs the package lpips.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write report.html into OUT; needs [plot].")] = False,
) -> None:
    """Measure how much it hurts to round each layer alone to 1, 2 and 3 bits.

    Shared out over processes by `accelerate launch -m diffusers_bitsfusion analyze ...`, on CPUs by `torchrun`.
    """
    with user_errors():
        from .analysis.sensitivity import analyze as run
        from .analysis.study import Settings
        from .evaluation import Sampling, read_prompts, sample_prompts
        from .processes import process_state

        if report:
            from .analysis.report import write_report  # a missing package shows now, not after hours
        captions = []
        if method != "weight":
            found = read_prompts(prompts or default_prompts(source))
            captions = [prompt.caption for prompt in sample_prompts(found, min(num_images, len(found)))]
        settings = Settings(
            qat_steps=qat_steps,
            learning_rate=learning_rate,
            calls=calls,
            sampling=Sampling(steps, guidance_scale, seed, batch_size, scheduler),
            lpips=lpips,
        )
        analysis = run(source, out, captions, method=method, settings=settings, clip=clip)
        if not process_state().is_main_process:
            return
        typer.echo(f"{len(analysis.header.layers)} layers at {len(analysis.header.bits)} numbers of bits: {out}")
        if report:
            write_report(analysis, out / "report.html")
            typer.echo(f"Report: {out / 'report.html'}")


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
        from .analysis.allocation import Totals
        from .analysis.allocation import allocate as run
        from .analysis.results import Analysis

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

    from .analysis.study import analysed_layers
    from .evaluation import DENOISERS

    place = {}
    folder = config_folder(source)
    if not is_model(folder):
        index = read_config(folder / "model_index.json")
        place["subfolder"] = next((name for name in DENOISERS if (index.get(name) or [None])[0]), "unet")
    config = diffusers.UNet2DConditionModel.load_config(folder, **place)  # any class reads any config
    with init_empty_weights():
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    return {name: tuple(layer.weight.shape) for name, layer in analysed_layers(model).items()}
