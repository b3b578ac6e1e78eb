"""`bitsfusion quantize --calibrate`."""

from __future__ import annotations

import pytest
from diffusers import StableDiffusionPipeline
from typer.testing import CliRunner

from diffusers_bitsfusion.cli import app


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("text", ["a cat\n\na red car\n", "Category\tPrompt\nAnimals\ta cat\nVehicles\ta red car\n"])
def test_prompts_are_lines_or_a_column(source_folder, tmp_path, monkeypatch, text):
    seen = {}

    def record(pipeline, config, calibration):
        seen["calibration"] = calibration
        raise ValueError("far enough")

    monkeypatch.setattr("diffusers_bitsfusion.quantize_model", record)
    (tmp_path / "prompts").write_text(text)
    options = ("--calibrate", "--prompts", tmp_path / "prompts", "--samples", 5, "--steps", 7, "--memory-gb", 2)
    result = run("quantize", source_folder, tmp_path / "out", *options)
    assert "far enough" in result.stderr
    calibration = seen["calibration"]
    assert calibration.prompts == ["a cat", "a red car"]
    assert (calibration.num_samples, calibration.num_inference_steps, calibration.memory_gb) == (5, 7, 2)


def test_a_calibrated_pipeline_is_saved_and_the_cache_is_gone(source_folder, tmp_path):
    options = ("--recipe", 1, "--calibrate", "--samples", 1, "--steps", 3, "--tuning-steps", 2)
    result = run("quantize", source_folder, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "packed weights" in result.stdout
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    said = loaded.unet.config.quantization_config.calibration
    assert [said[name] for name in ("num_samples", "num_inference_steps", "tuning_steps")] == [1, 3, 2]
    assert said["prompts"] == "default"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_no_prompts(source_folder, tmp_path):
    (tmp_path / "prompts").write_text("\n \n")
    options = ("--calibrate", "--prompts", tmp_path / "prompts")
    result = run("quantize", source_folder, tmp_path / "out", *options)
    assert result.exit_code == 1 and "prompts holds no prompts" in result.stderr


def test_a_model_without_its_pipeline(source_folder, tmp_path):
    result = run("quantize", source_folder / "unet", tmp_path / "out", "--recipe", 2, "--calibrate")
    assert result.exit_code == 1 and "a UNet2DConditionModel alone cannot be run" in result.stderr
