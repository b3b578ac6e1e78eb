"""Pipelines trained by examples/train_bitsfusion.py on a captioned data set, and their scores: what studies share."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import REPOSITORY
from diffusers_bitsfusion.evaluation import Sampling, evaluate, load_scorer, read_prompts, sample_prompts
from diffusers_bitsfusion.training.images import ArrayImages

SCORER = "examples.shapes.prompts:score"
BATCH_SIZE = 50  # pictures of 64×64 sampled at a time
SAMPLING = Sampling(batch_size=BATCH_SIZE)
HELD_OUT = 2000  # of the captioned images, at their end: never trained on


def count_trained(images: ArrayImages) -> int:
    """How many images, the first ones, are trained on; the held-out ones follow them.

    In the shapes set those without a caption come last, after both.
    """
    captioned = images.captions.index("") if "" in images.captions else len(images)
    return captioned - HELD_OUT


class HeldOutImages(ArrayImages):
    """The captioned images that training leaves out."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        first = count_trained(self)
        held_out = slice(first, first + HELD_OUT)
        self.images, self.captions = self.images[held_out], self.captions[held_out]


def train(pipeline: Path, data: Path, out: Path, options: Mapping[str, object], switches: Sequence[str] = ()) -> None:
    """Train to `out`, or go on with what an interrupted call left there; a finished one is kept.

    Args:
        pipeline: in full precision.
        data: a folder that `ArrayImages` reads.
        out: where the packed pipeline is written.
        options: of examples/train_bitsfusion.py, without their dashes.
        switches: further arguments, as they stand on a command line.
    """
    if (out / "model_index.json").exists():
        return
    given = {
        "pretrained_model_name_or_path": pipeline,
        "train_data_dir": data,
        "max_train_samples": count_trained(ArrayImages(data)),
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "output_dir": out,
        **options,
    }
    script = REPOSITORY / "examples" / "train_bitsfusion.py"
    arguments = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    subprocess.run([sys.executable, script, *arguments, *switches], check=True)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say how images are sampled for a score; read by `read_sampling`."""
    parser.add_argument("--num-images", type=int, help="of the prompts; default: all")
    parser.add_argument("--num-inference-steps", type=int, default=SAMPLING.steps)
    parser.add_argument("--scheduler", help="of diffusers; default: the pipeline's own")


def read_sampling(args: argparse.Namespace) -> Sampling:
    """How images are sampled, by the options of `add_sampling_arguments`."""
    return Sampling(steps=args.num_inference_steps, batch_size=BATCH_SIZE, scheduler=args.scheduler)


def sampling_arguments(args: argparse.Namespace) -> list[str]:
    """The options of `add_sampling_arguments` again, for another process."""
    options = {name: getattr(args, name) for name in ("num_images", "num_inference_steps", "scheduler")}
    given = {f"--{name.replace('_', '-')}": value for name, value in options.items() if value is not None}
    return [str(part) for option in given.items() for part in option]


def score(
    pipeline: Path,
    folder: Path,
    num_images: int | None,
    images: Path,
    guidance_scales: Sequence[float] = (),
    sampling: Sampling = SAMPLING,
) -> dict[str, Any]:
    """The report of `bitsfusion evaluate` on `folder` against `pipeline`, whose prompts and CLIP are used.

    Args:
        pipeline: in full precision, with `prompts.tsv` and `clip/` beside its parts.
        folder: the pipeline to score.
        num_images: of the prompts; None for all.
        images: keeps the pictures.
        guidance_scales: as of `evaluate`.
        sampling: as of `evaluate`.
    """
    return evaluate(
        folder,
        sample_prompts(read_prompts(pipeline / "prompts.tsv"), num_images),
        reference=None if folder == pipeline else pipeline,
        scorer=load_scorer(SCORER),
        clip=pipeline / "clip",
        sampling=sampling,
        guidance_scales=guidance_scales,
        images=images,
    )


def unet_bytes(folder: Path) -> int:
    """Of the files that hold the UNet's weights."""
    return sum(file.stat().st_size for file in (folder / "unet").glob("*.safetensors"))


def write_json(file: Path, report: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n")
