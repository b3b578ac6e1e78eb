"""Finding checkpoints, and naming damaged ones. Saving and continuing: test_loop.py."""

from __future__ import annotations

import json
import math

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from diffusers_bitsfusion.training.checkpoints import (
    find_checkpoint,
    load_checkpoint,
    read_settings,
    save_checkpoint,
)


@pytest.fixture
def run(tmp_path):
    """The folder of a run with checkpoints of both stages."""
    for stage, steps in (("stage1", (2, 4, 6)), ("stage2", (2, 4))):
        for step in steps:
            folder = tmp_path / stage / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            (folder / "run.json").write_text(json.dumps({"step": step, "settings": {"stage": int(stage[-1])}}))
    return tmp_path


def test_a_checkpoint_by_name_is_looked_for_in_the_output_folder(run):
    assert find_checkpoint(run, "checkpoint-4") == run / "stage2" / "checkpoint-4"
    assert find_checkpoint(run, "checkpoint-6") == run / "stage1" / "checkpoint-6"
    assert find_checkpoint(run / "stage1", "checkpoint-4") == run / "stage1" / "checkpoint-4"
    assert find_checkpoint(run / "stage2", "checkpoint-6") == run / "stage1" / "checkpoint-6"
    assert find_checkpoint(run, "stage1/checkpoint-2") == run / "stage1" / "checkpoint-2"


def test_a_path_and_the_latest(run, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    path = run / "stage1" / "checkpoint-2"
    assert find_checkpoint(other, str(path)) == path
    assert find_checkpoint(run / "stage1", "latest") == run / "stage1" / "checkpoint-6"
    assert find_checkpoint(other, "latest") is None and find_checkpoint(run, None) is None


def test_what_is_no_checkpoint_is_told_with_those_that_are(run):
    with pytest.raises(FileNotFoundError, match=r"checkpoint-9 is not a checkpoint.*stage1/checkpoint-6"):
        find_checkpoint(run, "checkpoint-9")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 1}'])
def test_a_damaged_checkpoint_is_named(run, content):
    path = run / "stage1" / "checkpoint-2"
    (path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"checkpoint-2/run\.json (is damaged|holds).*earlier checkpoint"):
        read_settings(path)


@pytest.mark.parametrize("part", ["moment", "rate", "weight", "average"])
def test_values_that_are_not_finite_are_refused(tmp_path, part):
    """Checkpoints of earlier versions have no checksums."""
    accelerator, settings = Accelerator(cpu=True), {"model": "m"}
    model = torch.nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    state = {"lr_scheduler": {}, "ema": {"shadow_params": [torch.ones(2)]}}
    path = save_checkpoint(accelerator, tmp_path, 1, state, settings)
    (path / "run.json").write_text(json.dumps({"step": 1, "settings": settings}))
    load_checkpoint(accelerator, path, settings)

    moments, weights = torch.load(path / "optimizer.bin"), load_file(path / "model.safetensors")
    if part == "moment":
        moments["state"][0]["exp_avg_sq"][0, 0] = math.inf
    elif part == "rate":
        moments["param_groups"][0]["lr"] = math.nan
    elif part == "weight":
        weights["weight"][1, 1] = math.nan
    else:
        state["ema"]["shadow_params"][0][1] = math.nan
    torch.save(moments, path / "optimizer.bin")
    torch.save(state, path / "run.pt")
    save_file(weights, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-1/\S+ holds NaN or infinite values.*earlier checkpoint"):
        load_checkpoint(accelerator, path, settings)
