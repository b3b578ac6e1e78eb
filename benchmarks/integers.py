"""What integer arithmetic costs in accuracy: the predicted noise in integers against the exact one.

    python -m benchmarks.integers PIPELINE [--score UNET]

PIPELINE, in full precision with `prompts.tsv` beside its parts, is quantized to as many bits as the published recipe;
its inputs are those of full precision's own denoising. Printed are the relative error over all calls, and of each.
With `--score`, a trained packed UNet then samples all prompts exactly and in integers, and the compositional scores
are compared.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from benchmarks.quality import TARGET, mixed
from benchmarks.trained import SCORER, add_sampling_arguments, read_sampling
from diffusers_bitsfusion import BitsFusionConfig, quantize_model, set_compute
from diffusers_bitsfusion.analysis.recording import record
from diffusers_bitsfusion.evaluation import (
    Sampling,
    bootstrap_scores,
    generate_images,
    image_metrics,
    load_pipeline,
    load_scorer,
    read_captions,
    read_prompts,
    sample_prompts,
)
from diffusers_bitsfusion.evaluation.compositional import judge

# Calls that are compared, and the denoising that they are of.
CALLS = 16
CALLS_SAMPLING = Sampling(steps=20, batch_size=6, seed=7)


def error_of_integers(args: argparse.Namespace) -> None:
    pipeline = load_pipeline(args.pipeline)
    prompts = read_captions(args.pipeline / "prompts.tsv")[: CALLS_SAMPLING.batch_size]
    calls = record(pipeline, pipeline.unet, prompts, CALLS_SAMPLING, CALLS, progress=False).calls
    recipe = mixed(TARGET)(pipeline.unet).recipe
    unet = quantize_model(pipeline.unet, BitsFusionConfig(recipe=recipe, time_embedding="table"), progress=False)
    with torch.no_grad():
        exact = [call.repeat(unet) for call in calls]
        set_compute(unet, "int8")
        errors = [call.repeat(unet) - expected for call, expected in zip(calls, exact, strict=True)]
    squares = [(float(error.square().sum()), float(y.square().sum())) for error, y in zip(errors, exact, strict=True)]
    total, size = map(sum, zip(*squares, strict=True))
    print(f"relative error {math.sqrt(total / size):.4f}")
    print("of each call", " ".join(f"{math.sqrt(error / y):.3f}" for error, y in squares))


def score_of_integers(args: argparse.Namespace) -> None:
    prompts = sample_prompts(read_prompts(args.pipeline / "prompts.tsv"), args.num_images)
    sampling = read_sampling(args)
    pipeline = load_pipeline(args.pipeline, sampling.scheduler)
    pipeline.unet = UNet2DConditionModel.from_pretrained(args.score, dtype=torch.float32)
    scorer, categories = load_scorer(SCORER), [prompt.category for prompt in prompts]
    scores, pictures = {}, {}
    for compute in ("exact", "int8"):
        set_compute(pipeline.unet, compute)
        images = generate_images(pipeline, [prompt.caption for prompt in prompts], sampling)
        pictures[compute] = images
        scores[compute] = judge(scorer, images, [prompt.spec for prompt in prompts])
    scores["int8 − exact"] = scores["int8"] - scores["exact"]
    for name, values in scores.items():
        overall = bootstrap_scores(values, categories)["overall"]
        print(f"{name}: score {overall.value:.3f} ({overall.low:.3f} to {overall.high:.3f})")
    psnr = image_metrics(pictures["int8"], pictures["exact"])["psnr"]
    print(f"PSNR of integers' pictures to the exact ones: {psnr.mean():.2f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--score", type=Path, metavar="UNET", help="folder of a trained packed UNet")
    add_sampling_arguments(parser)
    args = parser.parse_args()
    error_of_integers(args)
    if args.score is not None:
        score_of_integers(args)


if __name__ == "__main__":
    main()
