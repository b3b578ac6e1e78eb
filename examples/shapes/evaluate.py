"""Generates the held-out prompts with a pipeline and scores the images by category."""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from .captions import Prompt, heldout_prompts
from .scenes import CATEGORIES
from .scorer import score


def generate(
    pipeline: DiffusionPipeline,
    captions: Sequence[str],
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    seed: int = 1024,
    batch_size: int = 50,
) -> np.ndarray:
    """Images (n, 64, 64, 3) uint8; a caption's starting noise depends on `seed` and its place in the list alone."""
    side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    noise = torch.randn(len(captions), channels, side, side, generator=torch.Generator().manual_seed(seed))
    pipeline.set_progress_bar_config(disable=True)
    batches = []
    for start in tqdm(range(0, len(captions), batch_size), desc="images"):
        output = pipeline(
            list(captions[start : start + batch_size]),
            latents=noise[start : start + batch_size].to(pipeline.device, pipeline.unet.dtype),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="np",
        )
        batches.append((output.images * 255).round().astype(np.uint8))
    return np.concatenate(batches)


def score_by_category(prompts: Sequence[Prompt], images: np.ndarray) -> dict[str, float]:
    """The share of images that show what their prompt asks for, in each category and overall."""
    right = np.array(score(images, [prompt.spec for prompt in prompts]))
    categories = np.array([prompt.spec.category for prompt in prompts])
    scores = {name: float(right[categories == name].mean()) for name in CATEGORIES if name in categories}
    return {"overall": float(right.mean())} | scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", help="folder of a pipeline")
    parser.add_argument("--prompts", type=int, default=600, help="number of held-out prompts")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=1024)
    args = parser.parse_args()
    pipeline = DiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=torch.float32)
    prompts = heldout_prompts(args.prompts)
    images = generate(pipeline, [p.caption for p in prompts], args.steps, args.guidance_scale, args.seed)
    for name, value in score_by_category(prompts, images).items():
        print(f"{name:15} {value:.4f}")


if __name__ == "__main__":
    main()
