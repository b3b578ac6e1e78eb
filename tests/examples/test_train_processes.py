"""The training script killed and continued, and on two processes."""

from __future__ import annotations

import signal
import time

import pytest
import torch
import train_bitsfusion
from accelerate.utils import load
from fresh_process import REPOSITORY, FreshProcess, run_together
from safetensors.torch import load_file
from train_runs import losses

SCRIPT = REPOSITORY / "examples" / "train_bitsfusion.py"

# accelerate's file of the states of a process's random generators.
STATES = "random_states_0.pkl"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_killed_and_continued_it_is_the_uninterrupted_run(command, data, tmp_path):
    arguments = ("--train_data_dir", data, "--stage", 1, "--use_ema", "--checkpointing_steps", 2)
    process = FreshProcess([SCRIPT, *command(*arguments, steps=2000)])
    log = tmp_path / "out" / "stage1" / "losses.jsonl"
    while process.exitcode is None and (not log.exists() or log.read_text().count("\n") < 3):
        time.sleep(0.02)
    process.kill()
    assert process.result().returncode == -signal.SIGKILL

    reached = len(losses(tmp_path / "out" / "stage1"))
    steps = reached + 2
    train_bitsfusion.main(command(*arguments, "--resume_from_checkpoint", "latest", steps=steps))
    train_bitsfusion.main(command(*arguments, output="whole", steps=steps))
    assert losses(tmp_path / "out" / "stage1") == losses(tmp_path / "whole" / "stage1")
    states = [load(tmp_path / name / "stage1" / f"checkpoint-{steps}" / STATES) for name in ("out", "whole")]
    assert states[0]["step"] == states[1]["step"] == steps
    assert torch.equal(*(state["torch_manual_seed"] for state in states))


def test_two_processes_are_one_with_the_doubled_batch(command, data, tmp_path):
    # At the paper's rate: Adam's first steps are as large as it whatever the gradient, and a high one makes the run
    # chaotic, so that the last bits of sums in another order would show; guidance magnifies them in drawings, too.
    rate, drawing = ("--learning_rate", 1e-5), ("--guidance_scale", 1, "--drawing_steps", 2, "--redraw_every", 2)
    arguments = ("--prompts", data / "prompts.txt", "--stage", 1, "--use_ema", *drawing, *rate)
    two = command(*arguments, "--checkpointing_steps", 3, output="two", steps=5, batch=1)
    result = run_together([SCRIPT, *two])
    assert result.returncode == 0, result.stderr[-3000:]
    train_bitsfusion.main(command(*arguments, output="one", steps=5, batch=2))
    found, expected = losses(tmp_path / "two" / "stage1"), losses(tmp_path / "one" / "stage1")
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in expected], rel=1e-5)
    # Adam would not notice gradients summed instead of averaged, their norm does.
    assert [e["grad_norm"] for e in found] == pytest.approx([e["grad_norm"] for e in expected], rel=1e-3)

    # What two processes saved, one continues, in the middle of a set of drawings.
    checkpoint = tmp_path / "two" / "stage1" / "checkpoint-3"
    resume = ("--resume_from_checkpoint", checkpoint)
    train_bitsfusion.main(command(*arguments, *resume, output="continued", steps=5, batch=2))
    continued = [entry["loss"] for entry in losses(tmp_path / "continued" / "stage1")]
    assert continued == pytest.approx([e["loss"] for e in expected[3:]], rel=1e-5)


def test_processes_that_share_the_model_are_one(command, data, tmp_path):
    rate = ("--learning_rate", 1e-6, "--validation_prompts", "a b", "--validation_steps", 2)
    arguments = ("--train_data_dir", data, "--gradient_checkpointing", "--use_ema", *rate, "--num_inference_steps", 2)
    shared = ("--shard", "--checkpointing_steps", 2)
    result = run_together([SCRIPT, *command(*arguments, *shared, output="two", steps=4, batch=1, quiet=False)])
    assert result.returncode == 0, result.stderr[-3000:]
    train_bitsfusion.main(command(*arguments, "--checkpointing_steps", 2, output="one", steps=4, batch=2))
    for stage in ("stage1", "stage2"):
        found, expected = losses(tmp_path / "two" / stage), losses(tmp_path / "one" / stage)
        assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in expected], rel=1e-5)
        assert [e["grad_norm"] for e in found] == pytest.approx([e["grad_norm"] for e in expected], rel=1e-3)
    shared, alone = (state_of(tmp_path / name / "stage2" / "checkpoint-4") for name in ("two", "one"))
    torch.testing.assert_close(shared, alone, rtol=1e-2, atol=2e-6)
    assert (tmp_path / "two" / "validation" / "stage2-4.png").exists()
    assert load_file(tmp_path / "two" / "unet" / "diffusion_pytorch_model.safetensors")

    # What they saved, one continues alone, and what one saved, they do.
    halfway = {name: tmp_path / name / "stage2" / "checkpoint-2" for name in ("one", "two")}
    stage_two = (*arguments, "--stage", 2)
    train_bitsfusion.main(
        command(*stage_two, "--resume_from_checkpoint", halfway["two"], output="alone", steps=4, batch=2)
    )
    continued = command(
        *stage_two, "--shard", "--resume_from_checkpoint", halfway["one"], output="again", steps=4, batch=1
    )
    result = run_together([SCRIPT, *continued])
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("alone", "again"):
        found = [entry["loss"] for entry in losses(tmp_path / name / "stage2")]
        assert found == pytest.approx([e["loss"] for e in expected[2:]], rel=1e-5)
        resumed = state_of(tmp_path / name / "stage2" / "checkpoint-4")
        torch.testing.assert_close(resumed, alone, rtol=1e-2, atol=2e-6)


def state_of(checkpoint):
    """All that training carries on: weights, their averages, Adam's first moments in units of the largest."""
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    average = torch.load(checkpoint / "run.pt", weights_only=True)["ema"]["shadow_params"]
    moments = [1e-3 * state["exp_avg"] / state["exp_avg"].abs().max() for state in optimizer.values()]
    return load_file(checkpoint / "model.safetensors"), average, moments
