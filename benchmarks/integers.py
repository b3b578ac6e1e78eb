"""What integer arithmetic costs in accuracy: the predicted noise in integers against the exact one.

    python -m benchmarks.integers PIPELINE [--steps 20] [--images 6]

PIPELINE, in full precision with `prompts.tsv` beside its parts, is quantized to as many bits as the published recipe;
its inputs are those of full precision's own denoising. Printed are the relative error over all calls, and of each.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from benchmarks.quality import TARGET, mixed
from diffusers_bitsfusion import BitsFusionConfig, quantize_model, set_compute
from diffusers_bitsfusion.analysis.recording import record
from diffusers_bitsfusion.evaluation import Sampling, load_pipeline, read_captions

CALLS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=6)
    arguments = parser.parse_args()
    pipeline = load_pipeline(arguments.pipeline)
    prompts = read_captions(arguments.pipeline / "prompts.tsv")[: arguments.images]
    sampling = Sampling(steps=arguments.steps, batch_size=arguments.images, seed=7)
    calls = record(pipeline, pipeline.unet, prompts, sampling, CALLS, progress=False).calls
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


if __name__ == "__main__":
    main()
