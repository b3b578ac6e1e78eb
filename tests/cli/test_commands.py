"""The command line: that options reach what they name, and that bad input is one line and exit code 1."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_unet
from typer.testing import CliRunner, Result

from diffusers_bitsfusion.cli import app
from diffusers_bitsfusion.evaluation import image_distances

SCORER = "def right(images, specs):\n    return [spec['right'] for spec in specs]\n"


@pytest.fixture
def run(one_thread):
    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def fails(run):
    """The one line that a failing command writes."""

    def fails(*arguments: object) -> str:
        result = run(*arguments)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        return line

    return fails


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    rows = [f"{'ab'[i % 2]}\t{'xy'[i % 2]}\t" + json.dumps({"right": i < 3}) for i in range(4)]
    path = tmp_path / "prompts.tsv"
    path.write_text("\n".join(["Prompt\tCategory\tSpec", *rows]) + "\n")
    return path


@pytest.fixture
def scorer(tmp_path, monkeypatch) -> str:
    """A scorer beside which the command is run."""
    (tmp_path / "own_scorer.py").write_text(SCORER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return "own_scorer:right"


def test_quantize_and_inspect(run, source_folder, tmp_path):
    result = run("quantize", source_folder, tmp_path / "packed", "--target-bits", 2.6)
    assert result.exit_code == 0, result.output
    assert "bits a weight" in result.stdout and (tmp_path / "packed" / "unet").is_dir()
    figures = json.loads(run("inspect", tmp_path / "packed", "--json").stdout)
    assert figures["quantized"]["unet"]["bits_per_weight"]["paper"] <= 2.61
    assert "whole pipeline" in run("inspect", tmp_path / "packed").stdout


@pytest.mark.parametrize(
    "option", [("--tuning-steps", 3), ("--samples", 2), ("--steps", 5), ("--memory-gb", 1), ("--prompts", "p.txt")]
)
def test_options_of_calibration_without_it_are_refused(run, source_folder, tmp_path, option):
    result = run("quantize", source_folder, tmp_path / "packed", *option)
    assert result.exit_code == 2 and "are for --calibrate" in result.output
    assert not (tmp_path / "packed").exists()


def test_a_folder_that_is_not_there_is_named(fails, tmp_path):
    line = fails("quantize", tmp_path / "nowhere", tmp_path / "packed")
    assert line == f"Error: {tmp_path / 'nowhere'} is neither a folder nor a Hub id."


@pytest.mark.parametrize("part", ["", "unet"])
def test_what_is_quantized_is_not_quantized_again(fails, packed_folders, tmp_path, part):
    line = fails("quantize", packed_folders["keep"] / part, tmp_path / "packed", "--target-bits", 4)
    assert "is of a model that is quantized already" in line and not (tmp_path / "packed").exists()


def test_inspect_predicts_from_a_config(run, fails, tmp_path):
    (tmp_path / "config.json").write_text(tiny_unet().to_json_string())
    result = run("inspect", "--plan", tmp_path / "config.json", "--target-bits", 2.6, "--json")
    figures = json.loads(result.stdout)
    assert figures["where"] == "predicted file" and figures["bits_per_weight"]["paper"] <= 2.61
    assert "is not a file" in fails("inspect", "--plan", tmp_path / "none.json")


def test_evaluate(run, source_folder, packed_folders, prompts_file, scorer, tmp_path):
    pytest.importorskip("torchmetrics")
    written = tmp_path / "new" / "report.json"
    result = run(
        *("evaluate", packed_folders["table"], "--reference", source_folder, "--prompts", prompts_file),
        *("--scorer", scorer, "--steps", 2, "--guidance-scale", 2, "--guidance-scale", 3, "--json", written),
        *("--images", tmp_path / "images", "--seed", 7, "--batch-size", 3, "--scheduler", "DDIMScheduler"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(written.read_text())
    assert report["compositional"] == {"overall": 0.75, "x": 1.0, "y": 0.5}
    assert report["mse"] > 0 and list(report["by_guidance_scale"]) == ["2.0", "3.0"]
    used = {"steps": 2, "guidance_scale": 2.0, "seed": 7, "batch_size": 3, "scheduler": "DDIMScheduler", "images": 4}
    assert used.items() <= report["settings"].items()
    assert "compositional" in result.stdout and "0.7500" in result.stdout
    assert len(list((tmp_path / "images").rglob("*.png"))) == 2 * 2 * 4


def test_evaluate_takes_a_unet_alone(run, fails, source_folder, packed_folders, prompts_file, tmp_path):
    """The source with the packed UNet generates the packed pipeline's images."""
    pytest.importorskip("torchmetrics")
    written, packed = tmp_path / "report.json", packed_folders["table"]
    asked = ("evaluate", source_folder, "--unet", packed / "unet", "--prompts", prompts_file)
    result = run(*asked, "--reference", packed, "--steps", 2, "--json", written)
    assert result.exit_code == 0, result.output
    report = json.loads(written.read_text())
    assert report["mse"] == 0 and report["settings"]["unet"] == str(packed / "unet")
    result = run(*asked, "--reference", source_folder, "--steps", 2, "--json", written)
    assert result.exit_code == 0 and json.loads(written.read_text())["mse"] > 0
    assert "--card writes into the card in PATH" in fails(*asked, "--reference", source_folder, "--card")


def test_evaluate_some_prompts_of_the_file_beside_the_pipeline(run, source_folder, prompts_file, scorer, tmp_path):
    pipeline = Path(shutil.copytree(source_folder, tmp_path / "pipeline"))
    shutil.move(prompts_file, pipeline / "prompts.tsv")
    written = tmp_path / "report.json"
    result = run("evaluate", pipeline, "--scorer", scorer, "--steps", 1, "--num-images", 2, "--json", written)
    assert result.exit_code == 0, result.output
    assert json.loads(written.read_text())["settings"]["images"] == 2


def test_evaluate_writes_the_scores_into_the_card(run, fails, packed_folders, prompts_file, scorer, tmp_path):
    pipeline = Path(shutil.copytree(packed_folders["table"], tmp_path / "pipeline"))
    asked = (pipeline, "--prompts", prompts_file, "--scorer", scorer, "--steps", 1, "--card")
    for _ in range(2):  # the second time in place of the first
        assert run("evaluate", *asked).exit_code == 0
    card = (pipeline / "README.md").read_text()
    assert card.count("## Scores") == 1 and "0.7500" in card.split("## Scores")[1]
    # The scheduler is the pipeline's own. Four pictures have no interval.
    assert "4 images, 1 steps, guidance scale 7.5, seed 1024, PNDMScheduler" in card and " to " not in card
    (pipeline / "README.md").unlink()
    assert "no card" in fails("evaluate", *asked)


def test_compare(run, source_folder, packed_folders, prompts_file, tmp_path):
    out = tmp_path / "new" / "grid.png"
    paths = (source_folder, packed_folders["keep"], packed_folders["table"])
    result = run("compare", *paths, "--prompts", prompts_file, "--out", out, "--steps", 2, "--num-images", 3)
    assert result.exit_code == 0, result.output
    assert "3 prompts by 3 pipelines" in result.stdout
    with Image.open(out) as grid:
        width, height = grid.size
    assert width > 3 * 192 and 3 * 192 < height < 4 * 192


def test_bad_prompts(fails, source_folder, scorer, tmp_path):
    evaluate = ("evaluate", source_folder, "--scorer", scorer)
    assert "give a file with --prompts" in fails(*evaluate)
    bad = tmp_path / "bad.tsv"
    for content, message in (
        (b"Text\na\n", "has no column 'Prompt'"),
        (b"Prompt\n", "holds no prompts"),
        (b"Prompt\n\xff\n", "is not UTF-8"),
    ):
        bad.write_bytes(content)
        assert message in fails(*evaluate, "--prompts", bad)
        assert message in fails("compare", source_folder, "--prompts", bad, "--out", tmp_path / "grid.png")
    assert "none.tsv" in fails(*evaluate, "--prompts", tmp_path / "none.tsv")


def test_bad_pipelines_scorers_and_numbers(fails, source_folder, prompts_file, scorer, tmp_path):
    prompts = ("--prompts", prompts_file)
    assert "Nothing to measure" in fails("evaluate", source_folder, *prompts)
    assert "holds no pipeline" in fails("evaluate", source_folder / "unet", *prompts, "--scorer", scorer)
    assert "cannot be imported" in fails("evaluate", source_folder, *prompts, "--scorer", "no_such_module:f")
    assert "Cannot take 9 of 4" in fails("evaluate", source_folder, *prompts, "--scorer", scorer, "--num-images", 9)
    assert "steps is 0" in fails("evaluate", source_folder, *prompts, "--scorer", scorer, "--steps", 0)
    assert "holds no pipeline" in fails("compare", tmp_path, *prompts, "--out", tmp_path / "grid.png")
    assert "holds neither a model" in fails("inspect", tmp_path)


def test_missing_packages(fails, source_folder, prompts_file, monkeypatch):
    arguments = ("evaluate", source_folder, "--reference", source_folder, "--prompts", prompts_file)
    monkeypatch.setattr(image_distances, "find_spec", lambda name: None)
    assert "pip install diffusers_bitsfusion[eval]" in fails(*arguments)
