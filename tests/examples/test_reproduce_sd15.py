"""examples/reproduce_sd15.py: its plan, its table, and the whole of it on the shapes pipeline."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import reproduce_sd15 as script
import sd15_budgets
from fresh_process import FreshProcess

ARGUMENTS = ["--out", "O", "--prompts", "P.tsv", "--train_data_dir", "D"]


def plan(*more, budget="one-gpu"):
    args = script.parse_args([*ARGUMENTS, "--budget", budget, *more])
    return script.commands(args, script.BUDGETS[budget])


def option(command, name):
    return command[command.index(name) + 1]


def test_the_papers_budget_is_the_papers():
    commands = plan("--train_batch_size", "32", budget="paper")
    assert list(commands) == list(script.STEPS)
    for stage, steps, accumulation in (("stage1", "20000", "8"), ("stage2", "50000", "32")):
        assert option(commands[stage], "--max_train_steps") == steps
        assert option(commands[stage], "--gradient_accumulation_steps") == accumulation
    assert option(commands["stage1"], "--init") == "rounding"
    assert option(commands["analysis"], "--method") == "full" and option(commands["allocation"], "--rule") == "paper"


def test_one_gpu_starts_calibrated_and_trains_2000_steps():
    commands = plan()
    assert option(commands["stage1"], "--init") == "calibrated"
    assert option(commands["stage1"], "--max_train_steps") == "2000"
    assert option(commands["stage2"], "--init_from").endswith("checkpoint-2000")
    assert "--recipe" in commands["rounded"] and option(commands["rounded"], "--recipe") == str(Path("O/recipe.json"))


def test_every_step_can_be_skipped():
    for step in script.STEPS:
        assert list(plan("--skip", step)) == [name for name in script.STEPS if name != step]
    skipped = plan("--skip", "analysis", "allocation", "stage1")
    assert option(skipped["rounded"], "--recipe") == "auto"
    assert option(skipped["stage2"], "--init_from") == "rounding"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "P"], "--out is needed"),
        (["--out", "O", "--prompts", "P"], "The stages learn from images"),
        (["--out", "O", "--train_data_dir", "D"], "--prompts is needed: PartiPrompts.tsv from https://"),
        ([*ARGUMENTS, "--tifa_prompts", "T"], "TIFA needs both"),
    ],
)
def test_what_is_missing_is_said_at_once(arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(arguments)
    assert message in capsys.readouterr().err


def test_the_estimate_is_in_proportion(capsys):
    script.main(["--estimate", "--tflops", "50"])
    text = capsys.readouterr().out
    hours = {
        name: [float(x) for x in re.findall(rf"{name} +([\d.]+) h", text)] for name in ("stage1", "stage2", "sum")
    }
    paper, one_gpu = zip(*hours.values(), strict=True)
    # 20,000 steps of 256 samples, four forward passes each.
    assert paper[0] == pytest.approx(20_000 * 256 * 4 * sd15_budgets.FORWARD_TFLOP / 50 / 3600, abs=0.1)
    assert one_gpu[2] < paper[2] / 20 and text.count("GB") >= 4


def test_the_table_has_the_papers_columns_beside_the_measured_ones():
    def entry(score, task):
        scales = {str(s): {"clip_score": score + s} for s in (2.5, 3.5, 5.5, 7.5, 9.5)}
        judged = {"geneval": {"overall": task}, "note": "N."}
        return {"suites": {"clip": {"by_guidance_scale": scales}, "geneval": judged}}

    results = {"models": {"full": entry(20, 0.4), "stage2": entry(22, 0.5) | {"unet_bytes": 219e6}}}
    lines = script.table(results).splitlines()
    header, full, stage2 = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (0, 2, 3))
    row = dict(zip(header, stage2, strict=True))
    assert row["UNet, MB"] == "219.0" and row["CLIP, CFG 7.5"] == "0.2950" and row["CLIP, mean"] == "0.2850"
    assert row["GenEval"] == "0.5000" and row["TIFA"] == "" and row["paper: GenEval"] == "0.4682"
    assert dict(zip(header, full, strict=True))["paper: CLIP, CFG 7.5"] == "0.3175"
    assert lines[-1] == "N."


KINDS = {"object": dict, "string": str, "integer": int, "number": (int, float)}


def conforms(value, schema):
    """Whether a value is as the page's schema says, which uses these keywords alone."""
    if not isinstance(value, KINDS[schema["type"]]):
        return False
    if schema["type"] != "object":
        return True
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    return set(schema.get("required", ())) <= value.keys() and all(
        conforms(item, properties[name])
        if name in properties
        else (others if isinstance(others, bool) else conforms(item, others))
        for name, item in value.items()
    )


def schema():
    page = Path(script.__file__).parent.parent / "docs" / "evaluation.md"
    return json.loads(re.search(r"```json\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1])


def test_the_whole_of_it_on_the_shapes_and_again_from_what_is_done(tmp_path, monkeypatch, capsys):
    def run_step(command, env):
        assert command[0] == sys.executable
        result = FreshProcess(command[1:], env).result()
        assert result.returncode == 0, result.stderr[-3000:]
        return result

    with monkeypatch.context() as patched:
        patched.setattr(script, "subprocess", SimpleNamespace(run=run_step))
        patched.setattr(sys, "path", list(sys.path))  # which it adds to
        script.main(["--tiny", "--out", str(tmp_path)])
    rows = [line.split("|")[1].strip() for line in (tmp_path / "table.md").read_text().splitlines() if "|" in line]
    assert rows == ["", "---", *script.MODELS]
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["models"]) == list(script.MODELS)
    assert conforms(results, schema())
    assert not conforms(results | {"format": "1"}, schema()) and not conforms(results | {"more": 1}, schema())
    for name, model in results["models"].items():
        assert list(model["suites"]) == ["clip", "geneval"]
        assert list(model["suites"]["clip"]["by_guidance_scale"]) == ["2.5", "7.5", "9.5"]
        assert name == "full" or model["unet_bytes"] < 1.5e6
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    again = FreshProcess([script.__file__, "--tiny", "--out", tmp_path]).result()
    assert again.returncode == 0 and again.stdout.count("done before") == len(script.STEPS)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")} == times
