"""The trained pipeline that the repository holds: small, plain, and able to draw what it is asked for."""

from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors import safe_open

from examples.shapes.captions import heldout_prompts
from examples.shapes.evaluate import generate, score_by_category
from examples.shapes.prompts import write_prompts

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "shapes" / "pipeline"


def test_it_is_small_and_in_fp16():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 24e6
    for file in FOLDER.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} <= {"F16", "I64"}  # noqa: SIM118


def test_its_prompts_are_the_held_out_ones(tmp_path):
    write_prompts(tmp_path / "prompts.tsv")
    assert (FOLDER / "prompts.tsv").read_bytes() == (tmp_path / "prompts.tsv").read_bytes()


def test_it_loads_where_this_package_is_not_imported(run_python):
    code = (
        "import sys, diffusers;"
        f"diffusers.StableDiffusionPipeline.from_pretrained({str(FOLDER)!r});"
        "sys.exit('diffusers_bitsfusion' in sys.modules)"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_images_show_what_the_prompts_say():
    """Guessing draws nothing right. 24 prompts and ten steps: a look at it, not its score."""
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)  # needs few steps
    prompts = heldout_prompts(24)
    images = generate(pipeline, [prompt.caption for prompt in prompts], 10, batch_size=24)
    assert score_by_category(prompts, images)["overall"] >= 0.6
