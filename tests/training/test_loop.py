import copy
import json
import math
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from helpers import files_no_larger_than
from safetensors.torch import load_file

from diffusers_bitsfusion import prepare_qat
from diffusers_bitsfusion.qat import qat_layers
from diffusers_bitsfusion.training.batches import Sharing
from diffusers_bitsfusion.training.checkpoints import checkpoints, find_checkpoint, fingerprint, load_weights
from diffusers_bitsfusion.training.generated_latents import GeneratedBatches
from diffusers_bitsfusion.training.loop import LOG_FILE, LoopOptions, TrainingDiverged, TrainingLoop
from diffusers_bitsfusion.training.losses import Distillation
from diffusers_bitsfusion.training.measure import estimate, measure_timestep_errors, static_memory
from diffusers_bitsfusion.training.optimizer import make_optimizer, parameter_groups
from diffusers_bitsfusion.training.prompt_embeddings import TextEncoder
from diffusers_bitsfusion.training.sharding import ShardedModel
from diffusers_bitsfusion.utils.timesteps import TimestepDistribution

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make_loop(parts, make_config, tmp_path):
    """A Stage I loop from two prompts."""

    def make(
        folder="stage",
        steps=4,
        accumulation=1,
        settings=None,
        ema=True,
        rate=1e-3,
        use_8bit_adam=False,
        accelerator=None,
        **options,
    ):
        student = prepare_qat(copy.deepcopy(parts.unet).requires_grad_(True), make_config())
        scheduler = DDPMScheduler.from_config(parts.scheduler.config)
        text = TextEncoder(parts.tokenizer, parts.text_encoder)
        beta = TimestepDistribution.beta(1000)
        sharing = Sharing(2 // accumulation, accumulation)
        teacher = {"num_inference_steps": 2, "renewed_every": 3, "seed": 2}
        batches = GeneratedBatches(["a b", "c"], parts.unet, text, scheduler, beta, sharing, (4, 8, 8), **teacher)
        optimizer = make_optimizer(student, learning_rate=rate, use_8bit_adam=use_8bit_adam)
        return TrainingLoop(
            accelerator or Accelerator(cpu=True),
            student,
            Distillation(student, parts.unet),
            batches,
            optimizer,
            get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=8),
            tmp_path / folder,
            {"stage": 1, "model": fingerprint(student), "batch": 2} | (settings or {}),
            LoopOptions(steps, **({"checkpointing_steps": 2} | options)),
            EMAModel(student.parameters(), decay=0.9) if ema else None,
        )

    return make


def losses(loop):
    return [json.loads(line) for line in (loop.folder / LOG_FILE).read_text().splitlines()]


@pytest.mark.parametrize("use_8bit_adam", [False, True])
def test_a_continued_run_is_the_uninterrupted_one(make_loop, use_8bit_adam):
    whole = make_loop("whole", use_8bit_adam=use_8bit_adam)
    whole.train()
    assert [entry["step"] for entry in losses(whole)] == [1, 2, 3, 4]
    assert losses(whole)[0]["lr"] != losses(whole)[3]["lr"]  # the schedule is continued too
    moments = [moment for state in whole.optimizer.state.values() for moment in state.values()]
    assert any(torch.is_tensor(moment) and moment.dtype == torch.uint8 for moment in moments) == use_8bit_adam

    first = make_loop("cut", steps=2, use_8bit_adam=use_8bit_adam)
    first.train()
    with (first.folder / LOG_FILE).open("a") as log:
        log.write('{"step": 3, "lo')  # cut off by a kill
    second = make_loop("cut", use_8bit_adam=use_8bit_adam)
    second.resume(first.folder / "checkpoint-2")
    second.train()
    assert losses(second) == losses(whole)
    for a, b in zip(second.finish().parameters(), whole.finish().parameters(), strict=True):
        assert torch.equal(a, b)


def in_fp16(monkeypatch):
    """accelerate in fp16 on a CPU, where it would refuse to."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return accelerator


def test_an_overflow_in_fp16_is_skipped_and_its_scale_continued(make_loop, monkeypatch):
    whole = make_loop("whole", checkpointing_steps=1, accelerator=in_fp16(monkeypatch))
    overflow = iter([1.0, math.inf, 1.0, 1.0])
    whole.parameters[0].register_hook(lambda gradient: gradient * next(overflow))
    whole.train()
    assert [math.isfinite(entry["grad_norm"]) for entry in losses(whole)] == [True, False, True, True]
    assert whole.accelerator.scaler.get_scale() == 2.0**9
    one, two, three = (load_file(whole.folder / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(two[name], three[name]) for name in two)

    again = make_loop("again", checkpointing_steps=1, accelerator=in_fp16(monkeypatch))
    again.resume(whole.folder / "checkpoint-2")
    assert again.accelerator.scaler.get_scale() == 2.0**9
    again.train()
    assert losses(again)[-2:] == losses(whole)[-2:]


@pytest.mark.parametrize("kind", ["another shape", "a number", "a missing one"])
def test_moments_that_do_not_fit_the_parameters_are_refused(make_loop, kind):
    first = make_loop(steps=2)
    first.train()
    checkpoint = first.folder / "checkpoint-2"
    saved = torch.load(checkpoint / "optimizer.bin")
    state = next(state for state in saved["state"].values() if state["exp_avg"].dim() == 2)
    if kind == "another shape":
        state["exp_avg"] = torch.zeros(2, 3, 5)
    elif kind == "a number":
        state["exp_avg_sq"] = 1.0
    else:
        del state["exp_avg_sq"]
    torch.save(saved, checkpoint / "optimizer.bin")
    run = json.loads((checkpoint / "run.json").read_text())
    (checkpoint / "run.json").write_text(json.dumps({name: run[name] for name in ("step", "settings")}))
    with pytest.raises(ValueError, match=r"checkpoint-2/optimizer\.bin is damaged: a parameter .*earlier"):
        make_loop().resume(checkpoint)


def test_a_run_does_not_go_on_before_checkpoints_that_it_does_not_lead_to(make_loop):
    first = make_loop(steps=4)
    first.train()
    with pytest.raises(
        FileExistsError, match=r"holds checkpoints later than .*checkpoint-2: checkpoint-4. Delete them"
    ):
        make_loop().resume(first.folder / "checkpoint-2")
    shutil.rmtree(first.folder / "checkpoint-4")
    make_loop().resume(first.folder / "checkpoint-2")


def test_a_continued_run_has_its_own_rate_at_the_schedules_step(make_loop):
    make_loop(steps=2).train()
    second = make_loop(rate=1e-4)
    second.resume(find_checkpoint(second.folder, "latest"))
    second.train()
    rates = [entry["lr"] for entry in losses(second)]
    expected = [entry["lr"] for entry in trained_losses(make_loop("whole"))]
    assert rates == pytest.approx(expected[:2] + [rate / 10 for rate in expected[2:]])


def trained_losses(loop):
    loop.train()
    return losses(loop)


def test_the_log_of_a_run_continued_twice_elsewhere_has_each_step_once(make_loop):
    first = make_loop("first", steps=2)
    first.train()
    for _ in range(2):
        shutil.rmtree(first.folder.parent / "other" / "checkpoint-4", ignore_errors=True)
        other = make_loop("other")
        other.resume(first.folder / "checkpoint-2")
        other.train()
        assert [entry["step"] for entry in losses(other)] == [3, 4]


def test_accumulated_gradients_are_those_of_the_whole_batch(make_loop):
    whole, parts = make_loop("whole", steps=3), make_loop("parts", steps=3, accumulation=2)
    whole.train()
    parts.train()
    for found, expected in zip(losses(parts), losses(whole), strict=True):
        # The sums' order differs, and the optimizer's first steps divide by the gradients' own size.
        assert found == pytest.approx(expected, rel=1e-3)


def test_the_average_is_validated_and_given_back(make_loop):
    loop = make_loop(validation_steps=2)
    seen = {}
    loop.train(lambda step: seen.update({step: loop.student.conv_in.weight.clone()}))
    assert set(seen) == {2, 4} and not torch.equal(seen[2], seen[4])
    current = loop.student.conv_in.weight.clone()
    assert not torch.equal(current, seen[4])
    shadow = loop.ema.shadow_params[[n for n, _ in loop.student.named_parameters()].index("conv_in.weight")]
    assert torch.equal(seen[4], shadow)
    assert torch.equal(loop.finish().conv_in.weight, seen[4])


def test_stage_two_starts_from_the_averaged_weights(make_loop):
    loop = make_loop(steps=2)
    loop.train()
    fresh = make_loop("other").student
    load_weights(fresh, loop.folder / "checkpoint-2", loop.settings["model"])
    for a, b in zip(fresh.parameters(), loop.finish().parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="is of another model"):
        load_weights(fresh, loop.folder / "checkpoint-2", "0123")


def test_only_so_many_checkpoints_are_kept(make_loop):
    loop = make_loop(steps=3, checkpointing_steps=1, checkpoints_total_limit=2)
    loop.train()
    assert [path.name for path in checkpoints(loop.folder)] == ["checkpoint-2", "checkpoint-3"]
    assert find_checkpoint(loop.folder, "latest").name == "checkpoint-3"
    assert find_checkpoint(loop.folder, None) is None
    with pytest.raises(FileNotFoundError, match="is not a checkpoint of this training"):
        find_checkpoint(loop.folder, str(loop.folder))


@pytest.mark.parametrize("changed", [{"stage": 2}, {"model": "another"}, {"batch": 4}])
def test_a_checkpoint_of_another_run_is_refused(make_loop, changed):
    loop = make_loop(steps=2)
    loop.train()
    ((name, value),) = changed.items()
    other = make_loop(settings=changed)
    with pytest.raises(ValueError, match=f"cannot be continued: its {name} is .*, this run's is {value!r}"):
        other.resume(loop.folder / "checkpoint-2")


def test_fingerprints_tell_models_apart(parts, make_config):
    def of(unet, **changes):
        return fingerprint(prepare_qat(unet, make_config(**changes)))

    plain = of(copy.deepcopy(parts.unet))
    assert plain == of(copy.deepcopy(parts.unet))
    other = copy.deepcopy(parts.unet)
    other.conv_in.weight.data[0, 0, 0, 0] += 1
    others = ({"recipe": 3}, {"scale_init": "minmax"}, {"balance": False}, {"scale_iterations": 1})
    changed = [of(copy.deepcopy(parts.unet), **changes) for changes in others]
    assert len({plain, of(other), *changed}) == 6


def test_a_machine_whose_scales_differ_in_their_last_bits_may_continue(parts, make_config):
    here, there = (prepare_qat(copy.deepcopy(parts.unet), make_config()) for _ in range(2))
    with torch.no_grad():
        for layer in qat_layers(there).values():
            layer.scale *= 1 + 2**-23
    assert fingerprint(here) == fingerprint(there)


def test_nan_stops_the_run_and_names_the_batch(make_loop):
    loop = make_loop(steps=6)
    forward, calls = loop.objective.__call__, []

    def broken(model, batch):
        calls.append(batch)
        loss = forward(model, batch)
        return loss if len(calls) < 4 else type(loss)(loss.total * torch.nan, loss.parts)

    loop.objective = broken
    with pytest.raises(TrainingDiverged, match=r"loss is nan in step 4.* samples \[6, 7\] .*'a b'"):
        loop.train()
    assert [path.name for path in checkpoints(loop.folder)] == ["checkpoint-2"]
    assert [entry["step"] for entry in losses(loop)] == [1, 2, 3]


def test_a_full_disk_leaves_the_earlier_checkpoint(make_loop):
    loop = make_loop(steps=2)
    loop.train()
    before = {file: file.read_bytes() for file in loop.folder.rglob("*") if file.is_file()}
    loop.step = 3
    with files_no_larger_than(100_000), pytest.raises(OSError, match="checkpoint-2 is complete; continue from it"):
        loop.save()
    assert {file: file.read_bytes() for file in loop.folder.rglob("*") if file.is_file()} == before
    again = make_loop(steps=2)
    again.resume(find_checkpoint(again.folder, "latest"))
    assert again.step == 2


def test_what_an_interrupted_save_left_is_no_checkpoint(make_loop):
    loop = make_loop(steps=2)
    loop.train()
    (loop.folder / ".checkpoint-4.partial").mkdir()
    (loop.folder / ".checkpoint-4.partial" / "model.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoints(loop.folder)] == ["checkpoint-2"]
    loop.step = 4
    loop.save()
    assert sorted(path.name for path in loop.folder.glob("*check*")) == ["checkpoint-2", "checkpoint-4"]


def test_the_trial_step_learns_nothing(make_loop):
    plain, tried = make_loop("plain", steps=2), make_loop("tried", steps=2)
    cost = estimate(tried, static_memory(tried.student, [tried.objective.teacher]))
    assert cost.seconds_per_step > 0 and cost.steps == 2 and "2 steps" in str(cost)
    plain.train()
    tried.train()
    assert losses(tried) == losses(plain)


def test_a_step_costs_its_share_of_the_sampling(make_loop, monkeypatch):
    loop, clock = make_loop(accumulation=2), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def delayed(seconds, function):
        def call(*args):
            clock[0] += seconds
            return function(*args)

        return call

    loop.batches.start = delayed(30, loop.batches.start)
    loop.objective = delayed(2, loop.objective)
    cost = estimate(loop, {})
    assert cost.seconds_per_step == 2 * 2 + 30 / 3  # two forward passes; a set serves three steps


def test_memory_is_counted(make_loop):
    loop = make_loop()
    memory = static_memory(loop.student, [loop.objective.teacher], ema=True, optimizer_bytes=8)
    numbers = sum(p.numel() for p in loop.student.parameters())
    loop.train()
    held = sum(t.nbytes for state in loop.optimizer.state.values() for t in state.values() if t.dim())
    assert memory["optimizer"] == held == 8 * numbers
    assert memory["average (EMA)"] == sum(p.nbytes for p in loop.ema.shadow_params) == 4 * numbers
    assert static_memory(loop.student, [], ema=False, optimizer_bytes=2)["optimizer"] == 2 * numbers


def test_scales_biases_and_norms_do_not_decay(make_loop):
    student = make_loop().student
    student.conv_norm_out.weight.requires_grad_(False)
    decayed, others = (group["params"] for group in parameter_groups(student, 0.1))
    names = {id(p): name for name, p in student.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in decayed} == {"weight"}
    assert "conv_in.scale" in {names[id(p)] for p in others} and "conv_in.weight" in {names[id(p)] for p in decayed}
    assert len(decayed) + len(others) == len(names) - 1


def test_errors_along_the_timesteps(make_loop, parts):
    loop = make_loop()
    scheduler = DDPMScheduler.from_config(parts.scheduler.config)
    loop.batches.distribution = TimestepDistribution.uniform(1000)
    student = loop.student.eval()
    errors = measure_timestep_errors(loop.accelerator, student, parts.unet, loop.batches, scheduler, 36)
    assert len(errors.timesteps) > 5 and errors.timesteps == sorted(errors.timesteps)
    assert errors.errors[-1] > 10 * errors.errors[0] > 0  # (1 - alpha) / alpha grows by far more
    same = measure_timestep_errors(loop.accelerator, parts.unet, parts.unet, loop.batches, scheduler, 4)
    assert max(same.errors) == 0


def test_one_process_has_nobody_to_share_with(make_loop):
    loop = make_loop()
    with pytest.raises(ValueError, match="is sharded over several processes; launch them, or train without"):
        ShardedModel(loop.accelerator, loop.student)


def test_eight_bit_adam_says_what_it_needs(make_loop, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        make_optimizer(make_loop().student, use_8bit_adam=True)
