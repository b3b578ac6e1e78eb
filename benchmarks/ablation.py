"""The paper's ablation on a small trained pipeline, row by row, each trained with several seeds.

    python -m benchmarks.ablation PIPELINE --train-data DIR --work WORK --steps 2000 --stage2-steps 2000

PIPELINE has `prompts.tsv` and `clip/` beside its parts, as examples/shapes exports it; DIR is that data set. What WORK
holds already is not done again, and an interrupted training goes on, so the command can be stopped and started at
will (`timeout 150m python -m benchmarks.ablation ...`). Arguments that are not known here go to
examples/train_bitsfusion.py, before those of the row. Rows add up, as in the paper. Then follow the control that it
lacks, full precision trained on the same data for as long as Stage II, then Stage I on the captions alone, and both
Stages from calibrated rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from benchmarks.quality import SCALES, TARGET, mixed
from benchmarks.trained import (
    HeldOutImages,
    add_sampling_arguments,
    count_trained,
    read_sampling,
    score,
    train,
    write_json,
)
from diffusers_bitsfusion.training.batches import ImageBatches, Sharing
from diffusers_bitsfusion.training.images import ArrayImages, TrainingImages
from diffusers_bitsfusion.training.losses import Distillation
from diffusers_bitsfusion.training.prompt_embeddings import TextEncoder
from diffusers_bitsfusion.utils.timesteps import TimestepDistribution

RECIPE, PROMPTS = "mixed.json", "prompts.txt"

FEATURES = "+ feature distillation"
STAGE_1, STAGE_2, CONTROL = "+ Beta timesteps = Stage I", "+ Stage II", "full precision, Stage II's data"
CALIBRATED_1, CALIBRATED_2 = "Stage I, calibrated start", "Stage II, calibrated start"
SECOND_STAGES = {STAGE_2: STAGE_1, CALIBRATED_2: CALIBRATED_1, CONTROL: None}  # and the row that each goes on from
AT_ALL_SCALES = (FEATURES, STAGE_1, STAGE_2, CONTROL, CALIBRATED_1, CALIBRATED_2)

_UNIFORM = ("--recipe", "2", "--time_embedding", "keep")
_MIXED = ("--recipe", RECIPE, "--time_embedding", "table")
_PLAIN = ("--feature_weight", "0", "--timestep_sampling", "uniform")
ROWS: dict[str, tuple[str, ...]] = {
    "uniform 2 bit, min-max": (*_UNIFORM, *_PLAIN, "--no_balance", "--scale_init", "minmax"),
    "+ balance": (*_UNIFORM, *_PLAIN, "--scale_init", "minmax"),
    "+ alternating": (*_UNIFORM, *_PLAIN),
    "+ mixed precision and caching": (*_MIXED, *_PLAIN),
    FEATURES: (*_MIXED, "--timestep_sampling", "uniform"),
    STAGE_1: _MIXED,
    STAGE_2: _MIXED,
    CONTROL: ("--full_precision",),
    "Stage I, prompts alone": (*_MIXED, "--prompts", PROMPTS),
    CALIBRATED_1: (*_MIXED, "--init", "calibrated"),
    CALIBRATED_2: _MIXED,
}


def train_row(args: argparse.Namespace, row: str, seed: int) -> Path:
    """The folder of the trained pipeline."""
    out = args.work / f"{row}, seed {seed}"
    options = {
        "train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "ema_decay": args.ema_decay,
        "checkpointing_steps": 250,
        "seed": seed,
    }
    stage = ["--stage", "1", "--max_train_steps", str(args.steps)]
    if row in SECOND_STAGES:
        first = SECOND_STAGES[row]
        start = train_row(args, first, seed) / "stage1" / f"checkpoint-{args.steps}" if first else "rounding"
        stage = ["--stage", "2", "--init_from", str(start), "--max_train_steps", str(args.stage2_steps)]
        stage += ["--learning_rate", str(args.stage2_learning_rate)]
    switches = [str(args.work / switch) if switch in (RECIPE, PROMPTS) else switch for switch in ROWS[row]]
    train(args.pipeline, args.train_data, out, options, ["--use_ema", *args.train_arguments, *stage, *switches])
    return out


def measure(args: argparse.Namespace, row: str, folder: Path) -> dict[str, Any]:
    """The report of `bitsfusion evaluate`, with the held-out distillation loss."""
    file = folder / "report.json"
    if not file.exists():
        scales = args.guidance_scales if row in AT_ALL_SCALES else args.guidance_scales[:1]
        report = score(args.pipeline, folder, args.num_images, args.work / "images", scales, read_sampling(args))
        write_json(file, report | {"held_out_loss": held_out_loss(args, folder)})
    return json.loads(file.read_text())


@torch.no_grad()
def held_out_loss(args: argparse.Namespace, folder: Path, batches: int = 32, batch_size: int = 32) -> float:
    """Mean squared difference of the prediction from full precision's, on images outside the training set."""
    teacher = StableDiffusionPipeline.from_pretrained(args.pipeline, dtype=torch.float32)
    student = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=torch.float32)
    samples = ImageBatches(
        TrainingImages(HeldOutImages(args.train_data), teacher.unet.config.sample_size * teacher.vae_scale_factor),
        teacher.vae,
        TextEncoder(teacher.tokenizer, teacher.text_encoder),
        DDPMScheduler.from_config(teacher.scheduler.config),
        TimestepDistribution.uniform(1000),
        Sharing(batch_size),
        seed=1024,
    )
    samples.start(0)
    loss = Distillation(student, teacher.unet, feature_weight=0)
    return statistics.fmean(float(loss(student, samples.next()).total) for _ in range(batches))


def table(reports: dict[str, list[dict[str, Any]]]) -> str:
    """Mean over the seeds, and the lowest and highest of them."""
    figures = {
        "score": lambda report: report["compositional"]["overall"],
        "CLIP score": lambda report: report["clip_score"],
        "PSNR, dB": lambda report: report["psnr"],
        "CLIP FID": lambda report: report["clip_fid"],
        "CMMD": lambda report: report["cmmd"],
        "held-out loss": lambda report: report["held_out_loss"],
    }
    lines = [f"| {' | '.join(['', 'seeds', *figures])} |", "|---" * (2 + len(figures)) + "|"]
    for row, of_seeds in reports.items():
        cells = [row, str(len(of_seeds))]
        for read in figures.values():
            values = [read(report) for report in of_seeds]
            cells.append(f"{statistics.fmean(values):.4g} ({min(values):.4g} to {max(values):.4g})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_inputs(args: argparse.Namespace) -> None:
    """Keep the data-free recipe of as many bits over the layers as the published one has, and the captions."""
    unet = UNet2DConditionModel.from_pretrained(args.pipeline, subfolder="unet")
    args.work.mkdir(parents=True, exist_ok=True)
    mixed(TARGET)(unet).recipe.save(args.work / RECIPE)
    images = ArrayImages(args.train_data)
    captions = sorted(set(images.captions[: count_trained(images)]))
    (args.work / PROMPTS).write_text("\n".join(captions) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's ablation, row by row.")
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--train-data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="keeps pipelines, pictures and reports")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--stage2-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--stage2-learning-rate", type=float, default=5e-5, help="also of the control")
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--guidance-scales", type=float, nargs="+", default=SCALES, help="of the last rows")
    add_sampling_arguments(parser)
    args, args.train_arguments = parser.parse_known_args()
    args.pipeline, args.train_data, args.work = (p.resolve() for p in (args.pipeline, args.train_data, args.work))
    write_inputs(args)
    reports: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        for row in args.only:
            reports.setdefault(row, []).append(measure(args, row, train_row(args, row, seed)))
            print(table(reports), flush=True)


if __name__ == "__main__":
    main()
