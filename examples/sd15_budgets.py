"""The budgets of `reproduce_sd15.py`, and what each costs for Stable Diffusion 1.5."""

from __future__ import annotations

from dataclasses import dataclass

# Pipelines of the table.
MODELS = ("full", "rounded", "calibrated", "stage1", "stage2")

# TFLOP of one forward pass of Stable Diffusion 1.5's UNet for one image of 512×512.
FORWARD_TFLOP = 0.68
# GB of GPU memory in training without activations, of a checkpoint, of a saved pipeline and of an image.
TRAINING_GB, CHECKPOINT_GB, PIPELINE_GB, IMAGE_GB = 19.3, 13.8, 1.3, 0.45e-3
# Layers of the UNet, and numbers of bits, that the analysis measures.
LAYERS, BITS = 256, 3


@dataclass(frozen=True)
class Budget:
    """The extent of each step.

    Attributes:
        method: of `bitsfusion analyze`; "full" trains each layer and samples with it.
        analysis_images: images of the analysis.
        qat_steps: training steps of each layer in the analysis.
        rule: of `bitsfusion allocate`.
        init: what Stage I starts from.
        steps: training steps of Stage I and of Stage II.
        batch: samples of a step of Stage I and of Stage II.
        images: prompts of each suite, None for all (1,632 of PartiPrompts, 553 of GenEval).
        guidance_scales: at which the CLIP score is measured.
        inference_steps: of every image.
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


def estimate(tflops: float) -> str:
    """Return hours and GB of each step under both budgets, by arithmetic for Stable Diffusion 1.5."""
    lines = [f"Stable Diffusion 1.5 at 512x512, {tflops:g} TFLOP/s sustained by all GPUs together:"]
    for name, budget in BUDGETS.items():
        hours = {step: tflop / tflops / 3600 for step, tflop in _work(budget).items()}
        images = _num_images(budget) * len(MODELS)
        disk = images * IMAGE_GB + 4 * CHECKPOINT_GB + 5 * PIPELINE_GB
        lines += ["", f"--budget {name}", *(f"  {step:<12}{value:>10.1f} h" for step, value in hours.items())]
        lines += [f"  {'sum':<12}{sum(hours.values()):>10.1f} h", f"  {'disk':<12}{disk:>10.1f} GB"]
        lines += [f"  {'GPU memory':<12}{TRAINING_GB:>10.1f} GB and activations (docs/TRAINING.md)"]
    return "\n".join([*lines, "", "train_bitsfusion.py --estimate_only measures a step on your own GPU."])


def _work(budget: Budget) -> dict[str, float]:
    """Return the TFLOP of each step; a sample takes four forward passes to train on, three without a teacher."""
    image = 2 * (budget.inference_steps + 1) * FORWARD_TFLOP  # with guidance; PNDM repeats a step
    models = LAYERS * BITS
    analysis = models * 4 * FORWARD_TFLOP * 8
    if budget.method == "full":
        analysis = models * (budget.analysis_images * image + budget.qat_steps * 4 * 4 * FORWARD_TFLOP)
    stages = [steps * batch for steps, batch in zip(budget.steps, budget.batch, strict=True)]
    return {
        "analysis": analysis,
        "calibrated": 16 * 2 * 20 * FORWARD_TFLOP * 3,
        "stage1": stages[0] * 4 * FORWARD_TFLOP,
        "stage2": stages[1] * 3 * FORWARD_TFLOP,
        "evaluation": _num_images(budget) * len(MODELS) * image,
    }


def _num_images(budget: Budget) -> int:
    """Return the images of one model: PartiPrompts at each guidance scale, GenEval and TIFA at one."""
    parti, geneval, tifa = (min(count, budget.images or count) for count in (1632, 553, 4081))
    return parti * len(budget.guidance_scales) + geneval + tifa
