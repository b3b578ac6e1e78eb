"""The table of PEFT's own tests, from lines as they are recorded."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks.peft_tests import print_table, tuner


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_merge_layers[Conv2d 7 LOKR-Conv2d-LoKrConfig-config_kwargs116]", "LoKr"),
        ("test_set_adapter_non_overlapping_modules[BOFTConfig]", "BOFT"),
        ("test_loading_model_requires_grad_set_correctly[True-IA3Config]", "IA3"),
        ("test_multirank", "several or none"),
    ],
)
def test_a_test_is_counted_for_the_tuner_whose_configuration_it_has(name, expected):
    assert tuner(name) == expected


def test_the_table_says_why_tests_fail_and_names_what_it_does_not_know(tmp_path, capsys):
    def line(number: int, outcome: str, error: str = "") -> str:
        test = f"test_{number}[MLP-LoraConfig-config_kwargs{number}]"
        return json.dumps({"test": test, "outcome": outcome, "error": error, "where": "layer.py:3"})

    packed, floats = tmp_path / "packed.jsonl", tmp_path / "floats.jsonl"
    lines = [
        line(0, "passed"),
        line(1, "failed", "The adapter 'a' cannot be fused into packed weights: it has a bias"),
        line(2, "failed", "modules_to_save names lin1, whose weights are packed: they"),
        line(3, "failed", "no network"),
        line(4, "failed", "something new"),
        line(5, "skipped"),
    ]
    packed.write_text("\n".join(lines))
    floats.write_text(line(3, "failed", "no network"))
    assert print_table(argparse.Namespace(packed=packed, floats=floats)) == 0
    printed = capsys.readouterr().out
    assert "| Lora | 6 | 1 | 1 | 1 | 1 |  | 1 | 1 |" in printed and "| all | 6 |" in printed
    assert "test_4[" in printed and "something new" in printed and "test_3[" not in printed
