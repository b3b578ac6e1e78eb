"""The paper's table for your own model: analysis, allocation, both stages, and the evaluation of each, in one go.

    python examples/reproduce_sd15.py --out sd15 --train_data_dir IMAGES --prompts PartiPrompts.tsv \\
        --geneval_prompts evaluation_metadata.jsonl

Every step is a command of its own, printed before it runs. Run again, the script goes on where it was interrupted.
`--estimate` prints what it takes, `--tiny` runs all of it on the shapes pipeline in minutes (docs/evaluation.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent
SHAPES = EXAMPLES / "shapes" / "pipeline"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
STEPS = ("analysis", "allocation", "rounded", "calibrated", "stage1", "stage2", "evaluation")
MODELS = ("full", "rounded", "calibrated", "stage1", "stage2")
TABLE_SCALE = 7.5  # of GenEval and TIFA in the paper

# The paper's own figures: CLIP score at 7.5 on PartiPrompts and its mean over 3.5, 5.5, 7.5 and 9.5; GenEval; TIFA.
PAPER = {
    "full": (0.3175, 0.3156, 0.4262, 0.788),
    "stage1": (None, 0.3156, 0.4226, 0.789),
    "stage2": (0.3212, 0.3183, 0.4682, 0.821),
}
PAPER_MEAN = (3.5, 5.5, 7.5, 9.5)

# Of Stable Diffusion 1.5 at 512×512: one forward pass of the UNet for one picture, and what a checkpoint keeps.
FORWARD_TFLOP = 0.68
TRAINING_GB, CHECKPOINT_GB, PIPELINE_GB, PICTURE_GB = 19.3, 13.8, 1.3, 0.45e-3
LAYERS, BITS = 256, 3


@dataclass(frozen=True)
class Budget:
    """How much of each step.

    Attributes:
        method: of `bitsfusion analyze`; "full" trains each layer and draws with it.
        analysis_images, qat_steps: of the analysis.
        rule: of `bitsfusion allocate`.
        init: what Stage I starts from.
        steps, batch: of Stage I and of Stage II.
        images: prompts of each suite, None for all (1,632 of PartiPrompts, 553 of GenEval).
        guidance_scales: at which the CLIP score is measured.
        inference_steps: of every picture.
        target_bits: average bits a weight.
    """

    method: str
    analysis_images: int
    qat_steps: int
    rule: str
    init: str
    steps: tuple[int, int]
    batch: tuple[int, int]
    images: int | None = None
    guidance_scales: tuple[float, ...] = (2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5)
    inference_steps: int = 50
    target_bits: float = 1.99


BUDGETS = {
    "paper": Budget("full", 100, 100, "paper", "rounding", (20_000, 50_000), (256, 1024)),
    "one-gpu": Budget("prediction", 16, 0, "knapsack", "calibrated", (2_000, 2_000), (64, 64), 500),
}
TINY = Budget("weight", 2, 0, "knapsack", "rounding", (2, 2), (4, 4), 3, (2.5, 7.5, 9.5), 2, 3.0)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments; a wrong combination ends the program with a message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=SD15, help="Full-precision pipeline. Default: %(default)s")
    parser.add_argument("--out", type=Path, help="Folder for everything.")
    parser.add_argument("--budget", choices=tuple(BUDGETS), default="one-gpu", help="Default: %(default)s")
    parser.add_argument("--train_batch_size", type=int, default=16, help="Of one device; the rest is accumulated.")
    parser.add_argument("--mixed_precision", default="bf16", help="Of the training. Default: %(default)s")
    parser.add_argument("--dataset_name", help="Captioned images for Stage I and II, as for train_bitsfusion.py.")
    parser.add_argument("--train_data_dir", help="Instead, a folder of them.")
    parser.add_argument("--prompts", help="PartiPrompts.tsv; for the analysis and the CLIP score.")
    parser.add_argument("--geneval_prompts", help="GenEval's evaluation_metadata.jsonl; GenEval is left out without.")
    parser.add_argument("--tifa_prompts", help="TIFA's tifa_v1.0_text_inputs.json; TIFA is left out without.")
    parser.add_argument("--tifa_questions", help="TIFA's tifa_v1.0_question_answers.json.")
    parser.add_argument("--clip", help="CLIP of the score. Default: openai/clip-vit-base-patch32")
    parser.add_argument("--detector", help="Of GenEval, as for `bitsfusion evaluate`.")
    parser.add_argument("--color_classifier", help="Of GenEval, as for `bitsfusion evaluate`.")
    parser.add_argument("--skip", nargs="+", choices=STEPS, default=[], help="Steps to leave out.")
    parser.add_argument("--launcher", default=sys.executable, help='For several GPUs: "accelerate launch".')
    parser.add_argument("--estimate", action="store_true", help="Print hours and GB of both budgets; end.")
    parser.add_argument("--tflops", type=float, default=100, help="What the GPUs sustain, for --estimate.")
    parser.add_argument("--tiny", action="store_true", help="Run everything on the shapes pipeline, in minutes.")
    parser.add_argument("--evaluate_only", action="store_true", help=argparse.SUPPRESS)  # the last step's own process
    args = parser.parse_args(arguments)
    if not args.estimate and args.out is None:
        parser.error("--out is needed.")
    if not (args.estimate or args.tiny):
        _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    trains = {"stage1", "stage2"} - set(args.skip)
    if trains and args.dataset_name is None and args.train_data_dir is None:
        parser.error("The stages learn from images: give --dataset_name or --train_data_dir, or --skip stage1 stage2.")
    if args.prompts is None and {"analysis", "evaluation"} - set(args.skip):
        parser.error(
            "--prompts is needed: PartiPrompts.tsv from https://github.com/google-research/parti, or a file like it."
        )
    if (args.tifa_prompts is None) != (args.tifa_questions is None):
        parser.error("TIFA needs both --tifa_prompts and --tifa_questions.")


def make_tiny(args: argparse.Namespace) -> None:
    """Take the shapes pipeline, with prompts and a few images made for it, instead of what is asked for."""
    sys.path.insert(0, str(EXAMPLES.parent))
    from examples.shapes.dataset import build_dataset
    from examples.shapes.geneval import write_lines

    inputs = args.out / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    if not (inputs / "images" / "captions.json").is_file():
        build_dataset(inputs / "images", 40)
    write_lines(inputs / "evaluation_metadata.jsonl", 24)
    args.source, args.prompts, args.clip = str(SHAPES), str(SHAPES / "prompts.tsv"), str(SHAPES / "clip")
    args.geneval_prompts = str(inputs / "evaluation_metadata.jsonl")
    args.detector, args.color_classifier = "examples.shapes.geneval:detect", "examples.shapes.geneval:name_colors"
    args.train_data_dir, args.mixed_precision, args.train_batch_size = str(inputs / "images"), "no", 4


def commands(args: argparse.Namespace, budget: Budget) -> dict[str, list[str]]:
    """Return the command of each step that is not skipped, as arguments of Python."""
    out, package = args.out, ["-m", "diffusers_bitsfusion"]
    recipe = "auto" if "allocation" in args.skip else str(out / "recipe.json")
    quantize = [*package, "quantize", args.source]
    rounding = ["--recipe", recipe, "--target-bits", str(budget.target_bits)]
    analysis = ["--prompts", str(args.prompts), "--method", budget.method, "--num-images", str(budget.analysis_images)]
    calibration = ["--calibrate"] + (["--samples", "2", "--steps", "2"] if args.tiny else [])
    found = {
        "analysis": [
            *package, "analyze", args.source, "--out", str(out / "analysis"), *analysis,
            "--qat-steps", str(budget.qat_steps), "--steps", str(budget.inference_steps),
        ],
        "allocation": [
            *package, "allocate", str(out / "analysis"), "--out", recipe, "--rule", budget.rule,
            "--target-bits", str(budget.target_bits), "--model", args.source,
        ],
        "rounded": [*quantize, str(out / "rounded"), *rounding],
        "calibrated": [*quantize, str(out / "calibrated"), *rounding, *calibration],
        "stage1": [*_training(args, budget, 1, recipe), "--init", budget.init],
        "stage2": _training(args, budget, 2, recipe),
        "evaluation": [str(Path(__file__).resolve()), *_own_arguments(args), "--evaluate_only"],
    }  # fmt: skip
    return {name: command for name, command in found.items() if name not in args.skip}


def _training(args: argparse.Namespace, budget: Budget, stage: int, recipe: str) -> list[str]:
    out = args.out / f"stage{stage}"
    data = ["--dataset_name", args.dataset_name] if args.dataset_name else ["--train_data_dir", args.train_data_dir]
    accumulation = max(1, budget.batch[stage - 1] // args.train_batch_size)
    command = [
        str(EXAMPLES / "train_bitsfusion.py"), "--pretrained_model_name_or_path", args.source, *map(str, data),
        "--recipe", recipe, "--target_bits", str(budget.target_bits), "--stage", str(stage),
        "--max_train_steps", str(budget.steps[stage - 1]), "--train_batch_size", str(args.train_batch_size),
        "--gradient_accumulation_steps", str(accumulation), "--mixed_precision", args.mixed_precision,
        "--checkpoints_total_limit", "2", "--output_dir", str(out), "--resume_from_checkpoint", "latest",
    ]  # fmt: skip
    if stage == 2:
        first = args.out / "stage1" / "stage1" / f"checkpoint-{budget.steps[0]}"
        command += ["--init_from", "rounding" if "stage1" in args.skip and not first.is_dir() else str(first)]
    return command if args.tiny else [*command, "--gradient_checkpointing", "--use_ema"]


def _own_arguments(args: argparse.Namespace) -> list[str]:
    """Return this script's own arguments, for its last step."""
    names = ("source", "out", "budget", "prompts", "geneval_prompts", "tifa_prompts", "tifa_questions", "clip")
    given = {name: getattr(args, name) for name in (*names, "detector", "color_classifier")}
    own = [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    return own + (["--tiny"] if args.tiny else []) + (["--skip", *args.skip] if args.skip else [])


def run_step(name: str, command: list[str], args: argparse.Namespace) -> None:
    """Run a step, unless the same command has come to its end here before."""
    note = args.out / "done" / f"{name}.txt"
    line = shlex.join([*shlex.split(args.launcher), *command])
    if note.is_file() and note.read_text(encoding="utf-8") == line:
        print(f"{name}: done before")
        return
    print(f"{name}: {line}", flush=True)
    launched = [*shlex.split(args.launcher), *command]
    if name == "allocation":  # pure arithmetic, which several processes would only repeat
        launched = [sys.executable, *command]
    # Plug-ins of the shapes are found from the repository.
    paths = [str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(launched, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    if result.returncode:
        raise SystemExit(f"The step {name} failed; the same command goes on from there.")
    note.parent.mkdir(exist_ok=True)
    note.write_text(line, encoding="utf-8")


def evaluate_models(args: argparse.Namespace, budget: Budget) -> None:
    """Draw and score every model that is there; write results.json and table.md."""
    from diffusers_bitsfusion.evaluation import Sampling, SuiteFiles, evaluate_suites, load_suites
    from diffusers_bitsfusion.utils.processes import process_state

    files = SuiteFiles(
        prompts=args.prompts,
        geneval_prompts=args.geneval_prompts,
        tifa_prompts=args.tifa_prompts,
        tifa_questions=args.tifa_questions,
        detector=args.detector,
        color_classifier=args.color_classifier,
        clip=args.clip,
        num_images=budget.images,
    )
    named = [("geneval", args.geneval_prompts), ("tifa", args.tifa_prompts)]
    others = load_suites([name for name, file in named if file is not None], files)
    sampling = Sampling(steps=budget.inference_steps, guidance_scale=TABLE_SCALE, scheduler="PNDMScheduler")
    options: dict[str, Any] = {"images": args.out / "images"}
    models = {}
    for name in MODELS:
        path = Path(args.source) if name == "full" else args.out / name
        if name != "full" and not (path / "model_index.json").is_file():
            continue
        source = args.source if name == "full" else str(path)
        clip = load_suites(["clip"], files)
        found = evaluate_suites(source, clip, None, sampling, budget.guidance_scales, **options)
        models[name] = found["suites"] | evaluate_suites(source, others, None, sampling, **options)["suites"]
    if process_state().is_main_process:
        results = result_file(args, models)
        (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (args.out / "table.md").write_text(table(results), encoding="utf-8")


def result_file(args: argparse.Namespace, models: dict[str, Any]) -> dict[str, Any]:
    """Return what docs/evaluation.md has the schema of."""
    import torch

    import diffusers_bitsfusion
    from diffusers_bitsfusion import size_report

    sized = {}
    for name, suites in models.items():
        entry: dict[str, Any] = {"suites": suites}
        if name != "full":
            report = size_report(args.out / name / "unet")
            entry |= {"unet_bytes": report.total_bytes, "average_bits": report.average_bits.paper}
        sized[name] = entry
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "format": 1,
        "diffusers_bitsfusion": diffusers_bitsfusion.__version__,
        "source": str(args.source),
        "budget": "tiny" if args.tiny else args.budget,
        "device": gpu or platform.processor() or platform.machine(),
        "models": sized,
    }


def table(results: dict[str, Any]) -> str:
    """Return a Markdown table of the results, with the paper's figures beside them."""
    first = next(iter(results["models"].values()))["suites"]["clip"]["by_guidance_scale"]
    scales = list(first)
    titles = ["", "UNet, MB", *(f"CLIP, CFG {scale}" for scale in scales), "CLIP, mean", "GenEval", "TIFA"]
    titles += ["paper: CLIP, CFG 7.5", "paper: CLIP, mean", "paper: GenEval", "paper: TIFA"]
    lines = [titles, ["---"] * len(titles)]
    for name, entry in results["models"].items():
        suites = entry["suites"]
        clip = {scale: part["clip_score"] / 100 for scale, part in suites["clip"]["by_guidance_scale"].items()}
        own = [clip[str(scale)] for scale in PAPER_MEAN if str(scale) in clip]
        size = f"{entry['unet_bytes'] / 1e6:.1f}" if "unet_bytes" in entry else ""
        figures = [*clip.values(), sum(own) / len(own) if len(own) == len(PAPER_MEAN) else None]
        figures += [suites[key][key]["overall"] if key in suites else None for key in ("geneval", "tifa")]
        figures += PAPER.get(name, (None,) * 4)
        lines.append([name, size, *("" if figure is None else f"{figure:.4f}" for figure in figures)])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    parts = [part for entry in results["models"].values() for part in entry["suites"].values()]
    notes = sorted({part["note"] for part in parts if "note" in part})
    return "\n\n".join([text, "Mean: over CFG 3.5, 5.5, 7.5 and 9.5, as in the paper's ablation.", *notes]) + "\n"


def estimate(tflops: float) -> str:
    """Return hours and GB of each step under both budgets, by arithmetic for Stable Diffusion 1.5."""
    lines = [f"Stable Diffusion 1.5 at 512x512, {tflops:g} TFLOP/s sustained by all GPUs together:"]
    for name, budget in BUDGETS.items():
        hours = {step: tflop / tflops / 3600 for step, tflop in _work(budget).items()}
        pictures = _pictures(budget) * len(MODELS)
        disk = pictures * PICTURE_GB + 4 * CHECKPOINT_GB + 5 * PIPELINE_GB
        lines += ["", f"--budget {name}", *(f"  {step:<12}{value:>10.1f} h" for step, value in hours.items())]
        lines += [f"  {'sum':<12}{sum(hours.values()):>10.1f} h", f"  {'disk':<12}{disk:>10.1f} GB"]
        lines += [f"  {'GPU memory':<12}{TRAINING_GB:>10.1f} GB and activations (docs/TRAINING.md)"]
    return "\n".join([*lines, "", "train_bitsfusion.py --estimate_only measures a step on your own GPU."])


def _work(budget: Budget) -> dict[str, float]:
    """Return the TFLOP of each step; a sample takes four forward passes to train on, three without a teacher."""
    picture = 2 * (budget.inference_steps + 1) * FORWARD_TFLOP  # with guidance; PNDM repeats a step
    models = LAYERS * BITS
    analysis = models * 4 * FORWARD_TFLOP * 8
    if budget.method == "full":
        analysis = models * (budget.analysis_images * picture + budget.qat_steps * 4 * 4 * FORWARD_TFLOP)
    stages = [steps * batch for steps, batch in zip(budget.steps, budget.batch, strict=True)]
    return {
        "analysis": analysis,
        "calibrated": 16 * 2 * 20 * FORWARD_TFLOP * 3,
        "stage1": stages[0] * 4 * FORWARD_TFLOP,
        "stage2": stages[1] * 3 * FORWARD_TFLOP,
        "evaluation": _pictures(budget) * len(MODELS) * picture,
    }


def _pictures(budget: Budget) -> int:
    """Return the pictures of one model: PartiPrompts at each guidance scale, GenEval and TIFA at one."""
    parti, geneval, tifa = (min(count, budget.images or count) for count in (1632, 553, 4081))
    return parti * len(budget.guidance_scales) + geneval + tifa


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(arguments)
    if args.estimate:
        print(estimate(args.tflops))
        return
    budget = TINY if args.tiny else BUDGETS[args.budget]
    if args.tiny:
        make_tiny(args)
    if args.evaluate_only:
        evaluate_models(args, budget)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name, command in commands(args, budget).items():
        run_step(name, command, args)
    if (args.out / "table.md").is_file():
        print((args.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
