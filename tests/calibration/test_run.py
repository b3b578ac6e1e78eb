"""Calibrating whole pipelines: what comes out, interrupted runs, little memory, several processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_bitsfusion import quantize_model
from diffusers_bitsfusion.calibration import run as calibration_run
from diffusers_bitsfusion.calibration.denoising import Denoising
from diffusers_bitsfusion.calibration.passes import MAX_COLUMNS, Passes


@pytest.fixture
def calibrated(make_pipeline, config, make_calibration):
    """Calibrates a fresh pipeline and gives its UNet."""

    def calibrate(**changes):
        return quantize_model(make_pipeline(), config, progress=False, calibration=make_calibration(**changes)).unet

    return calibrate


def test_the_predicted_noise_stays_closer_than_by_plain_rounding(make_pipeline, config, calibrated, call_unet):
    exact = call_unet(make_pipeline().unet)
    plain = call_unet(quantize_model(make_pipeline(), config, progress=False).unet)
    assert (call_unet(calibrated()) - exact).square().mean() < 0.7 * (plain - exact).square().mean()


def test_a_saved_pipeline_is_the_calibrated_one(
    make_pipeline, config, make_calibration, call_unet, tmp_path, equal_models
):
    pipeline = make_pipeline()
    assert quantize_model(pipeline, config, progress=False, calibration=make_calibration(seed=5)) is pipeline
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert equal_models(loaded.unet, pipeline.unet)
    assert torch.equal(call_unet(loaded.unet), call_unet(pipeline.unet))
    said = {
        "prompts": "3 of the user's",
        "num_samples": 3,
        "num_inference_steps": 2,
        "guidance_scale": None,
        "seed": 5,
        "tuning_steps": 0,
    }
    assert loaded.unet.config.quantization_config.calibration == said


def test_half_precision_on_a_cpu_is_given_back_bit_for_bit(make_pipeline, config, make_calibration):
    pipeline = make_pipeline().to(torch.float16)
    before = {name: parameter.clone() for name, parameter in pipeline.unet.named_parameters()}
    quantize_model(pipeline, config, progress=False, calibration=make_calibration())
    after = dict(pipeline.unet.named_parameters())
    kept = [name for name in before if name in after and not name.startswith("down_blocks.0")]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    assert {p.dtype for p in after.values() if p.is_floating_point()} == {torch.float16}


def test_several_passes_give_what_one_gives(calibrated, monkeypatch, equal_models):
    def one_layer_each(layers, memory):
        return Passes([[name] for name in list(layers)[:3]] + [list(layers)[3:]], MAX_COLUMNS)

    whole = calibrated(num_samples=1)
    monkeypatch.setattr(calibration_run, "plan_passes", one_layer_each)
    assert equal_models(calibrated(num_samples=1), whole)


def test_other_seeds_look_at_other_inputs(calibrated, equal_models):
    assert not equal_models(calibrated(num_samples=1), calibrated(num_samples=1, seed=1))


@pytest.mark.parametrize("stage", ["sampling", "rounding"])
def test_an_interrupted_run_goes_on_where_it_stopped(calibrated, monkeypatch, tmp_path, stage, equal_models):
    monkeypatch.setattr(calibration_run, "_SAVE_EVERY", 0)
    monkeypatch.setattr(calibration_run, "_SAVE_SHARE", math.inf)
    whole = calibrated()
    sampled, rounded = [], []
    sample, quantize_layer = Denoising._sample, calibration_run.quantize_layer

    def interrupting(done, limit, function):
        def call(*args, **kwargs):
            if len(done) == limit:
                raise KeyboardInterrupt
            result = function(*args, **kwargs)
            done.append(args)
            return result

        return call

    limits = {"sampling": (2, None), "rounding": (None, 5)}[stage]
    with monkeypatch.context() as patched:
        patched.setattr(Denoising, "_sample", interrupting(sampled, limits[0], sample))
        patched.setattr(calibration_run, "quantize_layer", interrupting(rounded, limits[1], quantize_layer))
        with pytest.raises(KeyboardInterrupt):
            calibrated(cache_dir=tmp_path / "cache")
        done_before = len(rounded)
        (tmp_path / "cache" / "unet" / "0-pass0.pt.part").write_bytes(b"half a file")
        patched.setattr(Denoising, "_sample", interrupting(sampled, None, sample))
        patched.setattr(calibration_run, "quantize_layer", interrupting(rounded, None, quantize_layer))
        resumed = calibrated(cache_dir=tmp_path / "cache")
    assert equal_models(resumed, whole)
    assert len(sampled) == 3, "every batch is sampled once"
    assert len(rounded) == len({id(layer) for layer, *_ in rounded}) and done_before == (limits[1] or 0)


def test_a_finished_cache_is_enough(calibrated, monkeypatch, tmp_path, equal_models):
    whole = calibrated(cache_dir=tmp_path / "cache")
    monkeypatch.setattr(Denoising, "_sample", None)
    assert equal_models(calibrated(cache_dir=tmp_path / "cache"), whole)
    assert not list((tmp_path / "cache" / "unet").glob("*pass*")), "moments of finished layers take no space"


SCRIPT = """
import sys
sys.path[:0] = [sys.argv[3]]
import torch
from pathlib import Path
from tiny import tiny_pipeline
from diffusers_bitsfusion import BitsFusionConfig, Calibration, quantize_model
from diffusers_bitsfusion.utils.processes import process_state
folder, left = Path(sys.argv[1]), sys.argv[2].split(",")
state = process_state()
(own := folder / f"process{state.process_index}").mkdir()
pipeline = tiny_pipeline(own)
config = BitsFusionConfig(recipe=2, modules_to_not_convert=left)
prompts = ["a cat", "a red car", "two dogs"]
calibration = Calibration(prompts=prompts, num_samples=3, num_inference_steps=2, batch_size=1, tuning_steps=2)
unet = quantize_model(pipeline, config, progress=False, calibration=calibration).unet
torch.save(unet.state_dict(), folder / f"{state.process_index}-of-{state.num_processes}.pt")
"""


def test_two_processes_give_what_one_gives(calibrated, run_python, config, tmp_path):
    script = tmp_path / "calibrate.py"
    script.write_text(SCRIPT)
    launch = (  # `torchrun`
        "import sys; from torch.distributed.run import main;"
        "main(['--standalone', '--nproc-per-node', '2', *sys.argv[1:]])"
    )
    left = ",".join(config.modules_to_not_convert)
    examples = Path(__file__).parents[2] / "examples"
    # With an environment, though an empty one, the launcher is started as a user starts it.
    result = run_python(launch, script, tmp_path, left, examples, environment={})
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{i}-of-2.pt", weights_only=True) for i in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "both have all layers"
    alone = calibrated().state_dict()
    # Sums in another order differ in their last bits, and with them a code here and there.
    same = [(first[name] == alone[name]).float().mean() for name in alone if name.endswith(".codes")]
    assert first.keys() == alone.keys() and sum(same) / len(same) > 0.98
