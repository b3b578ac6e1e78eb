"""What calibration brings, and what it costs.

    python -m benchmarks.calibration quality PIPELINE --prompts HELD_OUT.tsv [--calibration-prompts FILE] [--recipe 2]
        [--samples 4 16] [--calibration-steps 5 20] [--tuning-steps 0 80] [--seeds 0 1 2]
    python -m benchmarks.calibration cost --work DIR [--memory-gb 8] [--samples 16] [--steps 20] [--dtype float32]

`quality` quantizes a pipeline without and with calibration, and compares it with full precision: PSNR of the pictures
at equal seeds, and the error of the predicted noise, relative to its square, on inputs of full precision's own
denoising (sharper than PSNR, which a few pictures that come out as other ones rule), and how much of classifier-free
guidance is kept there. `cost` calibrates a pipeline with a UNet of SD-1.5's shape and random weights, on this machine,
and prints seconds and peak memory over the pipeline's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, PNDMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.measure import measured_call
from benchmarks.sd15_shape import random_unet
from diffusers_bitsfusion import BitsFusionConfig, Calibration, Recipe, quantize_model
from diffusers_bitsfusion.analysis.recording import record
from diffusers_bitsfusion.calibration.calls import Call
from diffusers_bitsfusion.evaluation import Sampling, generate_images, image_metrics, load_pipeline, read_captions

CALLS = 32  # of full precision's denoising, to measure the error of the predicted noise on


@torch.no_grad()
def noise_error(unet: torch.nn.Module, calls: Sequence[Call]) -> float:
    """Mean square error of the predicted noise over its mean square."""
    errors = [(call.repeat(unet) - call.output).square().sum() for call in calls]
    return float(sum(errors) / sum(call.output.square().sum() for call in calls))


@torch.no_grad()
def guidance_kept(unet: torch.nn.Module, calls: Sequence[Call]) -> float:
    """What the prompt adds to the prediction without it, projected onto what it adds in full precision; 1 for that."""
    along = square = 0.0
    for call in calls:
        (without, given), (plain, full) = call.repeat(unet).chunk(2), call.output.chunk(2)
        along += float(((given - without) * (full - plain)).sum())
        square += float((full - plain).square().sum())
    return along / square


def quality(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each setting."""
    prompts = read_captions(arguments.prompts)[: arguments.num_images]
    own = read_captions(arguments.calibration_prompts) if arguments.calibration_prompts else None
    sampling = Sampling(steps=arguments.steps, guidance_scale=arguments.guidance_scale, batch_size=12)
    pipeline = load_pipeline(arguments.pipeline, arguments.scheduler)
    calls = record(pipeline, pipeline.unet, prompts[:6], replace(sampling, seed=7), CALLS, progress=False).calls
    reference = generate_images(pipeline, prompts, sampling)
    base = Calibration(own, guidance_scale=arguments.guidance_scale)
    rows = []
    for label, calibration in settings(base, arguments).items():
        pipeline = load_pipeline(arguments.pipeline, arguments.scheduler)
        recipe = int(arguments.recipe) if arguments.recipe.isdecimal() else Recipe.load(arguments.recipe)
        config = BitsFusionConfig(recipe=recipe, time_embedding="table")
        measured = measured_call(_quantize, pipeline, config, calibration)
        psnr = image_metrics(generate_images(pipeline, prompts, sampling, progress=False), reference)["psnr"]
        row = {
            "setting": label,
            "psnr": float(psnr.mean()),
            "standard_error": float(psnr.std(ddof=1) / np.sqrt(len(psnr))),
            "noise_error": noise_error(pipeline.unet, calls),
            "guidance_kept": guidance_kept(pipeline.unet, calls),
            "cpu_seconds": measured["cpu_seconds"],
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def settings(base: Calibration, arguments: argparse.Namespace) -> Mapping[str, Calibration | None]:
    """Without calibration, and each combination of what was asked for."""
    found: dict[str, Calibration | None] = {"uncalibrated": None}
    asked = product(arguments.samples, arguments.calibration_steps, arguments.tuning_steps, arguments.seeds)
    for samples, steps, tuning, seed in asked:
        label = f"{samples} pictures of {steps} steps, tuned by {tuning}, seed {seed}"
        found[label] = replace(base, num_samples=samples, num_inference_steps=steps, tuning_steps=tuning, seed=seed)
    return found


def random_sd15_pipeline(dtype: torch.dtype) -> StableDiffusionPipeline:
    """SD-1.5's UNet with random weights; text encoder and VAE, which are not calibrated, are tiny."""
    from examples.tiny import tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny_tokenizer(Path(folder))
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=768, num_hidden_layers=1, num_attention_heads=12
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=8, latent_channels=4, sample_size=512, **blocks)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=random_unet(),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu", dtype)


def cost(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds and peak memory of the whole calibration; interrupted, it goes on from DIR."""
    pipeline = random_sd15_pipeline(getattr(torch, arguments.dtype))
    calibration = Calibration(
        num_samples=arguments.samples,
        num_inference_steps=arguments.steps,
        batch_size=1,
        memory_gb=arguments.memory_gb,
        tuning_steps=arguments.tuning_steps,
        cache_dir=arguments.work,
    )
    return [measured_call(_quantize, pipeline, BitsFusionConfig(), calibration)]


def _quantize(
    pipeline: DiffusionPipeline, config: BitsFusionConfig, calibration: Calibration | None
) -> dict[str, Any]:
    quantize_model(pipeline, config, calibration=calibration)
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    of_quality = commands.add_parser("quality")
    of_quality.add_argument("pipeline")
    of_quality.add_argument("--prompts", type=Path, required=True, help="tab-separated, or one prompt a line")
    of_quality.add_argument("--calibration-prompts", type=Path, help="the same; default: the shipped list")
    of_quality.add_argument("--recipe", default="2", help="bits of all layers, or a recipe's path")
    of_quality.add_argument("--num-images", type=int, default=48)
    of_quality.add_argument("--steps", type=int, default=20, help="that the compared images are sampled in")
    of_quality.add_argument("--guidance-scale", type=float, default=7.5)
    of_quality.add_argument("--scheduler", help="diffusers scheduler; default: the pipeline's own")
    several: dict[str, Any] = {"type": int, "nargs": "+"}
    of_quality.add_argument("--samples", **several, default=[16], help="images sampled to calibrate")
    of_quality.add_argument("--calibration-steps", **several, default=[20], help="that they are sampled in")
    of_quality.add_argument("--tuning-steps", **several, default=[0], help="tuned as well, by so many steps")
    of_quality.add_argument("--seeds", **several, default=[0, 1, 2], help="of calibration")
    of_quality.set_defaults(measure=quality)
    of_cost = commands.add_parser("cost")
    of_cost.add_argument("--work", type=Path, required=True, help="folder that keeps what is done")
    of_cost.add_argument("--memory-gb", type=float, default=8.0)
    of_cost.add_argument("--samples", type=int, default=16)
    of_cost.add_argument("--steps", type=int, default=20)
    of_cost.add_argument("--tuning-steps", type=int, default=0)
    of_cost.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the pipeline"
    )
    of_cost.set_defaults(measure=cost)
    arguments = parser.parse_args()
    print(json.dumps(arguments.measure(arguments), indent=2))


if __name__ == "__main__":
    main()
