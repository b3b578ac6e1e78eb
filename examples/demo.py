"""Quantize a pipeline, report its size, save it, reload it in a fresh process, and draw with it and with the original.

    python examples/demo.py --out demo

Writes OUT/packed (the quantized pipeline) and OUT/side_by_side.png: full precision, the UNet that was trained in about
2 bits (of the shapes pipeline, examples/shapes/unet-2bit), and the one rounded just now.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

import diffusers_bitsfusion
from diffusers_bitsfusion import BitsFusionConfig, size_report
from diffusers_bitsfusion.evaluation import image_grid
from diffusers_bitsfusion.reporting.size_report import MB, SizeReport

PROMPTS = [
    "a red circle",
    "a blue square and a green triangle",
    "three yellow stars",
    "a heart to the left of a ring",
]
SCALE = 3
SHAPES = Path(__file__).parent / "shapes" / "pipeline"
TRAINED = Path(__file__).parent / "shapes" / "unet-2bit"  # for SHAPES


def draw(path: Path, target: Path, steps: int, unet: Path | None = None) -> None:
    """Write the pipeline's pictures of all prompts side by side, drawn with the UNet in `unet` where one is given."""
    parts = {} if unet is None else {"unet": UNet2DConditionModel.from_pretrained(unet, dtype=torch.float32)}
    pipe = StableDiffusionPipeline.from_pretrained(path, dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(1024 + i) for i in range(len(PROMPTS))]
    images = pipe(PROMPTS, num_inference_steps=steps, guidance_scale=7.5, generator=generators).images
    width, height = images[0].size
    strip = Image.new("RGB", (len(images) * width, height))
    for i, image in enumerate(images):
        strip.paste(image, (i * width, 0))
    strip.resize((SCALE * strip.width, SCALE * strip.height), Image.Resampling.NEAREST).save(target)


def pictures(strip: Path) -> np.ndarray:
    """(prompts, height, width, 3) uint8: what `draw` put side by side."""
    return np.stack(np.split(np.asarray(Image.open(strip)), len(PROMPTS), axis=1))


def label(name: str, report: SizeReport) -> str:
    """What stands above the pictures of a UNet in a file."""
    return f"{name}: {report.average_bits.layers:.2f} bits, {report.total_bytes / MB:.2f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the packed pipeline and the pictures")
    parser.add_argument("--pipeline", type=Path, default=SHAPES, help="in full precision; default: %(default)s")
    parser.add_argument("--target-bits", type=float, default=3.0, help="average bits a weight to aim at")
    parser.add_argument("--steps", type=int, default=50)
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
    packed = size_report(out / "packed" / "unet")
    columns = {f"full precision: 16 bits, {packed.fp16_bytes / MB:.2f} MB": out / "full.png"}
    if source.resolve() == SHAPES.resolve():
        draw(source, out / "trained.png", arguments.steps, TRAINED)
        report = size_report(TRAINED)
        columns[label("trained", report)] = out / "trained.png"
        print(f"\nThe UNet in {TRAINED}, trained in this precision:\n{report}")
    command = [sys.executable, __file__, "--out", str(out), "--draw", str(out / "packed")]
    subprocess.run([*command, "--steps", str(arguments.steps)], check=True)
    columns[label("rounded only, packed and reloaded", packed)] = out / "packed.png"
    drawn = [pictures(strip) for strip in columns.values()]
    image_grid(drawn, list(columns), PROMPTS).save(out / "side_by_side.png")
    print(f"From the left: {'; '.join(columns)}: {out / 'side_by_side.png'}")


if __name__ == "__main__":
    main()
