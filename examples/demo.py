"""Quantize a pipeline, report its size, save it, reload it in a fresh process, and draw with both.

    python examples/demo.py --out demo

Writes OUT/packed (the quantized pipeline) and OUT/side_by_side.png (full precision above, packed below).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import diffusers_bitsfusion
from diffusers_bitsfusion import BitsFusionConfig, size_report

PROMPTS = [
    "a red circle",
    "a blue square and a green triangle",
    "three yellow stars",
    "a heart to the left of a ring",
]
SCALE = 3
SHAPES = Path(__file__).parent / "shapes" / "pipeline"


def draw(path: Path, target: Path, steps: int) -> None:
    """Write the pipeline's pictures of all prompts side by side."""
    pipe = StableDiffusionPipeline.from_pretrained(path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(1024 + i) for i in range(len(PROMPTS))]
    images = pipe(PROMPTS, num_inference_steps=steps, guidance_scale=7.5, generator=generators).images
    width, height = images[0].size
    strip = Image.new("RGB", (len(images) * width, height))
    for i, image in enumerate(images):
        strip.paste(image, (i * width, 0))
    strip.resize((SCALE * strip.width, SCALE * strip.height), Image.Resampling.NEAREST).save(target)


def stack(above: Path, below: Path, target: Path) -> None:
    """One picture of two, `above` over `below`."""
    top, bottom = Image.open(above), Image.open(below)
    joined = Image.new("RGB", (top.width, top.height + bottom.height + 6), "white")
    joined.paste(top, (0, 0))
    joined.paste(bottom, (0, top.height + 6))
    joined.save(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the packed pipeline and the pictures")
    parser.add_argument("--pipeline", type=Path, default=SHAPES, help="in full precision; default: %(default)s")
    parser.add_argument("--target-bits", type=float, default=3.0, help="average bits a weight to aim at")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)  # the fresh process: draw with this pipeline
    arguments = parser.parse_args()
    out = arguments.out
    if arguments.draw is not None:
        draw(arguments.draw, out / "packed.png", arguments.steps)
        return

    out.mkdir(parents=True, exist_ok=True)
    source = arguments.pipeline
    print(f"diffusers_bitsfusion {diffusers_bitsfusion.__version__}: quantizing {source}")
    config = BitsFusionConfig(target_bits=arguments.target_bits)
    pipe = StableDiffusionPipeline.from_pretrained(source, quantization_config=config, dtype=torch.float16)
    pipe.save_pretrained(out / "packed")
    print(size_report(out / "packed"))

    draw(source, out / "full.png", arguments.steps)
    command = [sys.executable, __file__, "--out", str(out), "--draw", str(out / "packed")]
    subprocess.run([*command, "--steps", str(arguments.steps)], check=True)
    stack(out / "full.png", out / "packed.png", out / "side_by_side.png")
    print(f"Full precision above, packed and reloaded below: {out / 'side_by_side.png'}")


if __name__ == "__main__":
    main()
