"""The packed UNet that the repository holds beside the shapes pipeline: about 2 bits a weight, and it still draws."""

from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel

from diffusers_bitsfusion import size_report
from examples.shapes.captions import heldout_prompts
from examples.shapes.evaluate import generate, score_by_category

SHAPES = Path(__file__).resolve().parents[2] / "examples" / "shapes"
TRAINED = SHAPES / "unet-2bit"


def float_weights(folder):
    """Linear and Conv2d weights of a UNet in full precision."""
    unet = UNet2DConditionModel.from_pretrained(folder)
    return sum(m.weight.numel() for m in unet.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)))


def test_it_is_small_and_of_the_published_average():
    report = size_report(TRAINED)
    assert all(file.stat().st_size < 1e6 for file in TRAINED.iterdir())
    assert report.average_bits.layers < 2.05
    assert report.weights == float_weights(SHAPES / "pipeline" / "unet")


def test_images_show_what_the_prompts_say():
    """Rounded to as many bits without training, the same pipeline draws 0.29 of these prompts."""
    unet = UNet2DConditionModel.from_pretrained(TRAINED, dtype=torch.float32)
    pipeline = StableDiffusionPipeline.from_pretrained(SHAPES / "pipeline", unet=unet, dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)  # needs few steps
    prompts = heldout_prompts(24)
    images = generate(pipeline, [prompt.caption for prompt in prompts], 10, batch_size=24)
    assert score_by_category(prompts, images)["overall"] >= 0.6
