"""What rounding costs a trained pipeline: quantized without training by many methods, all sampled and scored alike.

    python -m benchmarks.quality PIPELINE --work DIR [--only NAME ...] [--peers-python PYTHON]

PIPELINE has `prompts.tsv` and `clip/` beside its parts, as examples/shapes exports it. Every method runs in a fresh
process and leaves a pipeline and a report in DIR; a later call goes on where this one stopped. Calibration sees the
steps and the scheduler that the images are sampled with. SDNQ lives in an environment of its own
(`pip install sdnq scipy -e ".[eval]"`; the scorer needs SciPy).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measure import REPOSITORY, is_installed, run_child
from benchmarks.trained import add_sampling_arguments, read_sampling, sampling_arguments, score, unet_bytes
from diffusers_bitsfusion.evaluation import Sampling, load_pipeline

SCALES = (7.5, 3.5, 5.5, 9.5)  # guidance scales of full precision; the others are sampled at 7.5
SHAPES = REPOSITORY / "examples" / "shapes"
SEEDS = range(3)  # of calibration
SIZES = (1000, 780)  # kB of the UNet's file
TUNED = {"num_samples": 128, "tuning_steps": 320}
TARGET = 2.04  # bits a weight over the quantized layers: the published recipe's


def mixed(bits: float) -> Callable[[Any], Any]:
    """Data-free allocation of `bits` a weight over all layers but the first and the last."""

    def config(unet: Any) -> Any:
        from diffusers_bitsfusion import BitsFusionConfig, Recipe
        from diffusers_bitsfusion.allocation.data_free import allocate_data_free
        from diffusers_bitsfusion.packing.planning import recipe_layers

        sizes = {name: layer.weight.numel() for name, layer in recipe_layers(unet).items()}
        recipe = Recipe(allocate_data_free(sizes, bits * sum(sizes.values())))
        return BitsFusionConfig(recipe=recipe, time_embedding="cache")

    return config


def uniform(bits: int, balance: bool = True, scale_init: str = "alternating") -> Callable[[Any], Any]:
    """The same bits everywhere but in the first and the last layer."""

    def config(unet: Any) -> Any:
        from diffusers_bitsfusion import BitsFusionConfig

        return BitsFusionConfig(recipe=bits, balance=balance, scale_init=scale_init, time_embedding="cache")

    return config


def shipped(unet: Any) -> Any:
    """The recipe of the shapes pipeline, by its sensitivity analysis."""
    from diffusers_bitsfusion import BitsFusionConfig, Recipe

    return BitsFusionConfig(recipe=Recipe.load(SHAPES / "recipe.json"), time_embedding="table")


def shipped_for_bytes(kilobytes: int) -> Callable[[Any], Any]:
    """The same recipe's differences between layers, in a file of so many kB (1000 bytes)."""

    def config(unet: Any) -> Any:
        made = shipped(unet)
        made.target_bytes = 1000 * kilobytes
        return made

    return config


def calibrated(base: Callable[[Any], Any], seed: int = 0, **settings: Any) -> Callable[[Any], Any]:
    """`base`, with calibration on captions of the kind that the pipeline was trained on."""

    def config(unet: Any) -> Any:
        from diffusers_bitsfusion import Calibration
        from diffusers_bitsfusion.evaluation import read_captions

        made = base(unet)
        prompts = read_captions(SHAPES / "calibration_prompts.txt")
        made.calibration = Calibration(prompts, seed=seed, **settings)
        return made

    return config


def sdnq(**settings: Any) -> Callable[[Any], Any]:
    def config(unet: Any) -> Any:
        from sdnq import SDNQConfig

        return SDNQConfig(quant_conv=True, **settings)

    return config


# SDNQ leaves small layers alone unless told otherwise; here they are a quarter of the weights.
EVERY_LAYER = {"weights_dtype": "uint2", "minimum_allowed_numel": 0, "minimum_allowed_channel_size": 0}

METHODS: dict[str, Callable[[Any], Any] | None] = {
    "full precision": None,
    "mixed 2.04": mixed(TARGET),
    "mixed 2.32": mixed(2.3219),
    "mixed 3.17": mixed(3.1699),
    **{f"uniform {n}": uniform(n) for n in (1, 2, 3, 4, 8)},
    **{f"uniform {n}, unbalanced": uniform(n, balance=False) for n in (1, 2, 3, 4, 8)},
    "uniform 2, unbalanced, min-max": uniform(2, balance=False, scale_init="minmax"),
    "by analysis 2.03": shipped,
    **{f"by analysis 2.03, calibrated, seed {seed}": calibrated(shipped, seed) for seed in SEEDS},
    **{f"by analysis 2.03, tuned, seed {seed}": calibrated(shipped, seed, **TUNED) for seed in SEEDS},
    **{
        f"calibrated for {kb} kB, seed {seed}": calibrated(shipped_for_bytes(kb), seed)
        for kb in SIZES
        for seed in SEEDS
    },
    **{
        f"tuned for {kb} kB, seed {seed}": calibrated(shipped_for_bytes(kb), seed, **TUNED)
        for kb in SIZES
        for seed in SEEDS
    },
    **{f"uniform {n}, calibrated, seed {seed}": calibrated(uniform(n), seed) for n in (1, 2, 3, 4) for seed in SEEDS},
    **{f"uniform {n}, tuned, seed {seed}": calibrated(uniform(n), seed, **TUNED) for n in (3, 4) for seed in SEEDS},
    "SDNQ uint2, row-wise": sdnq(weights_dtype="uint2", group_size=-1),
    "SDNQ uint2": sdnq(weights_dtype="uint2"),
    "SDNQ uint2 everywhere, row-wise": sdnq(**EVERY_LAYER, group_size=-1),
    "SDNQ uint2 everywhere": sdnq(**EVERY_LAYER),
    "SDNQ uint2 everywhere, row-wise, SVD": sdnq(**EVERY_LAYER, group_size=-1, use_svd=True),
    "SDNQ uint2 everywhere, row-wise, Hadamard": sdnq(**EVERY_LAYER, group_size=-1, use_hadamard=True),
    "SDNQ uint2 everywhere, row-wise, codebook": sdnq(**EVERY_LAYER, group_size=-1, use_codebook=True),
    "SDNQ uint4, row-wise": sdnq(weights_dtype="uint4", group_size=-1),
    "SDNQ uint4": sdnq(weights_dtype="uint4"),
}


def make(source: Path, out: Path, method: str, sampling: Sampling) -> None:
    """Save the pipeline at `source` with its UNet quantized by `method` to `out`, for the timesteps of `sampling`."""
    import torch
    from diffusers import UNet2DConditionModel

    pipeline = load_pipeline(source, sampling.scheduler, torch.float32)
    make_config = METHODS[method]
    config = None if make_config is None else make_config(pipeline.unet)
    if getattr(config, "time_embedding", None) == "cache":
        pipeline.scheduler.set_timesteps(sampling.steps)
        timesteps = sorted(set(pipeline.scheduler.timesteps.tolist()))
        config.time_embedding = {"type": "cache", "timesteps": timesteps}
    if getattr(config, "calibration", None) is not None:
        from diffusers_bitsfusion import quantize_model

        config.calibration = replace(config.calibration, num_inference_steps=sampling.steps)
        quantize_model(pipeline, config)
    elif config is not None:
        pipeline.unet = UNet2DConditionModel.from_pretrained(
            source, subfolder="unet", dtype=torch.float32, quantization_config=config
        )
    pipeline.save_pretrained(out)


def run_method(source: Path, work: Path, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize, sample and measure; the report of `bitsfusion evaluate` with the UNet's file size."""
    if method.startswith("SDNQ"):
        import sdnq  # noqa: F401  (registers its method with diffusers)

    folder, sampling = source, read_sampling(args)
    if METHODS[method] is not None:
        folder = work / method
        if not (folder / "model_index.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(source, folder, method, sampling)
    scales = args.guidance_scales if folder == source else ()
    report = score(source, folder, args.num_images, work / "images", scales, sampling)
    return report | {"unet_bytes": unet_bytes(folder)}


def table(reports: dict[str, dict[str, Any] | str]) -> str:
    """The reports as a Markdown table, scores with 95 % intervals."""
    categories = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    titles = ["", "UNet file, kB", "score", *categories, "CLIP score", "PSNR, dB", "CMMD"]
    lines = [f"| {' | '.join(titles)} |".replace("_", " "), "|---" * len(titles) + "|"]
    for method, report in reports.items():
        if isinstance(report, str):
            lines.append(f"| {method} | {report} |" + " |" * (4 + len(categories)))
            continue
        scores, intervals = report["compositional"], report["intervals"]["compositional"]
        low, high = intervals["overall"]
        cells = [f"{report['unet_bytes'] / 1e3:.0f}", f"{scores['overall']:.3f} ({low:.3f} to {high:.3f})"]
        cells += [f"{scores[category]:.2f}" for category in categories]
        cells += [f"{report['clip_score']:.2f}"]
        cells += [f"{report[key]:.{digits}f}" if key in report else "" for key, digits in (("psnr", 2), ("cmmd", 3))]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scale_table(by_scale: dict[str, dict[str, Any]]) -> str:
    """Scores of full precision at several guidance scales, with 95 % intervals."""
    lines = ["| guidance scale | score | CLIP score |", "|---|---|---|"]
    for scale, report in by_scale.items():
        low, high = report["intervals"]["compositional"]["overall"]
        score = f"{report['compositional']['overall']:.3f} ({low:.3f} to {high:.3f})"
        lines.append(f"| {scale} | {score} | {report['clip_score']:.2f} |")
    return "\n".join(lines)


def run_all(source: Path, work: Path, args: argparse.Namespace) -> dict[str, dict[str, Any] | str]:
    """Every method that has no report yet, each in a fresh process; reports by name."""
    scales = ["--guidance-scales", *map(str, args.guidance_scales)]
    arguments = ["-m", "benchmarks.quality", str(source), "--work", str(work), *scales, *sampling_arguments(args)]
    reports: dict[str, dict[str, Any] | str] = {}
    for method in args.only:
        file = work / "reports" / f"{method}.json"
        python = args.peers_python if method.startswith("SDNQ") else sys.executable
        if not file.exists():
            if method.startswith("SDNQ") and not is_installed("sdnq", python):
                reports[method] = "not installed"
                continue
            report = run_child([*arguments, "--worker", method], python)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(report, indent=2) + "\n")
        reports[method] = json.loads(file.read_text())
        print(table({method: reports[method]}).splitlines()[-1], file=sys.stderr)
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize a trained pipeline by many methods and score the pictures.")
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="keeps pipelines, pictures and reports")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--worker", choices=METHODS, help="run this one here")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has SDNQ installed")
    parser.add_argument(
        "--guidance-scales", type=float, nargs="+", default=SCALES, help="of full precision's pictures"
    )
    add_sampling_arguments(parser)
    args = parser.parse_args()
    source, work = args.pipeline.resolve(), args.work.resolve()
    if args.worker:
        print(json.dumps(run_method(source, work, args.worker, args)))
    else:
        reports = run_all(source, work, args)
        print(table(reports))
        if "by_guidance_scale" in reports.get("full precision", {}):
            print("\n" + scale_table(reports["full precision"]["by_guidance_scale"]))


if __name__ == "__main__":
    main()
