"""The prepared run on a GPU, dry: what its parts are given, and what becomes of those that fail."""

from __future__ import annotations

import sys

from benchmarks import gpu


def test_parts_that_fail_or_take_too_long_are_reported_and_the_rest_goes_on():
    asked = [
        gpu.Part("fails", ["-c", "print('| 1 |'); raise ValueError('no kernel')"], 60),
        gpu.Part("sleeps", ["-c", "import time; print('begun', flush=True); time.sleep(600)"], 3),
        gpu.Part("works", ["-c", "print('noise'); print('| a |'); print('| 2 |')"], 60),
        gpu.Part("later", ["-c", "print(3)"], 60),
    ]
    outcomes = {part.name: gpu.run_part(part, 0 if part.name == "later" else 60) for part in asked}
    assert [outcome.state for outcome in outcomes.values()] == ["failed", "out of time", "done", "out of time"]
    text = gpu.page(outcomes, "cpu")
    assert "ValueError: no kernel" in text and "begun" in text and "noise" not in text
    assert text.index("| fails | failed |") < text.index("| works | done |") < text.index("## works\n\n| a |\n| 2 |")


def test_the_limits_of_all_parts_are_nine_minutes(tmp_path):
    assert sum(part.limit for part in gpu.parts(tmp_path, "cuda", tiny=False)) <= 9 * 60


def test_a_step_of_training_runs_on_a_small_model(monkeypatch, capsys):  # CI's dry run does all parts
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny", "--worker", "qat"])
    gpu.main()
    header, _, values = capsys.readouterr().out.strip().splitlines()[-3:]
    assert "seconds" in header and float(values.split("|")[1]) > 0
