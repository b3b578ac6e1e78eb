"""`bitsfusion analyze` and `bitsfusion allocate`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from diffusers_bitsfusion import Recipe
from diffusers_bitsfusion.analysis import allocate as allocation
from diffusers_bitsfusion.analysis.results import Analysis
from diffusers_bitsfusion.cli import app

from .conftest import CAPTIONS

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(*arguments: object) -> str:
    """The one line that a failing command writes."""
    result = run(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line


@pytest.fixture
def saved(full, tmp_path):
    (tmp_path / "analysis.jsonl").write_text(full.to_text())
    return tmp_path


def test_analyze_accepts_its_options(small_folder, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "analysis"
    options = {"--method": "output", "--num-images": 2, "--steps": 3, "--guidance-scale": 2.0, "--seed": 7}
    options |= {"--batch-size": 1, "--scheduler": "DDIMScheduler", "--calls": 2}
    result = run("analyze", small_folder, "--out", out, *(x for pair in options.items() for x in pair), "--report")
    assert result.exit_code == 0, result.output
    settings = Analysis.load(out).header.settings
    assert {"steps": 3, "guidance_scale": 2.0, "seed": 7, "batch_size": 1, "calls": 2}.items() <= settings.items()
    assert settings["scheduler"] == "DDIMScheduler" and len(settings["prompts"]) == 2
    assert set(settings["prompts"]) < set(CAPTIONS)
    assert "<!doctype html>" in (out / "report.html").read_text()


def test_allocate_writes_a_recipe_that_fits(full, saved, small_folder, target_of):
    target = target_of(2.2)
    for options in ((), ("--rule", "paper", "--eta", 0.1), ("--rule", "data-free")):
        out = saved / "new" / "recipe.json"
        written = ("--out", out, "--overwrite")
        result = run("allocate", saved, "--target-bits", target, *written, "--model", small_folder, *options)
        assert result.exit_code == 0, result.output
        recipe = Recipe.load(out)
        rule = options[1] if options else "knapsack"
        expected = allocation.allocate(full, target, rule=rule, eta=0.1 if rule == "paper" else 0.3)
        assert recipe == expected and recipe.shapes == full.shapes and rule in recipe.source
        assert str(allocation.Totals.of(recipe, full)) in result.stdout
    budget = allocation.Totals.of(recipe, full).bytes
    result = run("allocate", saved / "analysis.jsonl", "--max-bytes", budget, *written)
    assert result.exit_code == 0 and f"max_bytes={budget}" in Recipe.load(out).source
    result = run("allocate", saved, "--max-bytes", budget, "--metric", "psnr", *written)
    assert result.exit_code == 0
    assert Recipe.load(out) == allocation.allocate(full.by("psnr"), max_bytes=budget)
    assert Recipe.load(out).source.endswith("by psnr")


def test_allocate_refuses_what_does_not_fit(saved, source_folder, tmp_path):
    out = ("--out", tmp_path / "recipe.json")
    message = fails("allocate", saved, *out, "--model", source_folder)
    assert "The analysis is of another model" in message and "also has" in message
    assert "of another model" in fails("allocate", saved, *out, "--model", source_folder / "unet")
    assert "cannot be reached for this model" in fails("allocate", saved, *out, "--target-bits", 1.2)
    assert "rule must be one of" in fails("allocate", saved, *out, "--rule", "best")
    assert "metric must be one of" in fails("allocate", saved, *out, "--metric", "best")
    lines = (saved / "analysis.jsonl").read_text().splitlines()
    other = json.dumps(json.loads(lines[5]) | {"run": "0123456789ab"})
    for content, expected in (
        (lines[:-1], "lacks 1 of 72 lines"),
        ([*lines, lines[3]], "is there twice"),
        ([*lines[:5], other, *lines[6:]], "line 6 is not of this analysis, but of another model"),
    ):
        (saved / "analysis.jsonl").write_text("\n".join(content) + "\n")
        assert expected in fails("allocate", saved, *out)
    assert "is not finished" in fails("allocate", tmp_path / "..", *out)
    assert not out[1].exists()


def test_analyze_says_what_is_missing(small_folder, source_folder, tmp_path):
    assert "give a file with --prompts" in fails("analyze", source_folder, "--out", tmp_path)
    assert "method must be one of" in fails("analyze", small_folder, "--out", tmp_path, "--method", "best")
    assert "calls is 0" in fails("analyze", small_folder, "--out", tmp_path, "--calls", 0)


def test_a_packed_pipeline_is_refused(packed_folders, tmp_path):
    message = fails("analyze", packed_folders["keep"], "--out", tmp_path, "--method", "weight")
    assert "is quantized already" in message


@pytest.mark.parametrize("kind", ["table", "keep"])
def test_allocate_counts_the_time_embedding_as_quantize_does(saved, small_folder, target_of, kind):
    out = saved / "recipe.json"
    asked = ("--model", small_folder, "--time-embedding", kind, "--json")
    result = run("allocate", saved, "--target-bits", target_of(2.6), "--out", out, *asked)
    assert result.exit_code == 0, result.output
    quantized = run(
        "quantize",
        small_folder,
        saved / kind,
        "--recipe",
        out,
        "--time-embedding",
        kind,
        "--dtype",
        "float32",
        "--json",
    )
    figures = json.loads(quantized.stdout)["quantized"]["unet"]["bits_per_weight"]
    assert json.loads(result.stdout)["paper_bits"] == pytest.approx(figures["paper"], abs=1e-6)
    assert run("allocate", saved, "--out", saved / "no.json", "--time-embedding", kind).exit_code == 2
