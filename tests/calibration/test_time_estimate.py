"""The time of a calibration, estimated from a trial and counted by a clock that ticks with every call of the model."""

from __future__ import annotations

import pytest
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler

from diffusers_bitsfusion import quantize_model
from diffusers_bitsfusion.calibration import time_estimate
from diffusers_bitsfusion.calibration.time_estimate import CalibrationTime, SamplingTime, estimate_time
from diffusers_bitsfusion.utils.durations import as_duration


@pytest.fixture
def clock(monkeypatch):
    """The number of calls of the models it is given to, in place of the time."""

    class Clock:
        calls = 0

        def counts(self, model):
            model.register_forward_pre_hook(lambda *_: setattr(self, "calls", self.calls + 1))

    made = Clock()
    monkeypatch.setattr(time_estimate, "now", lambda _: float(made.calls))
    return made


@pytest.mark.parametrize("scheduler", [PNDMScheduler, DDIMScheduler, HeunDiscreteScheduler])
def test_sampling_is_estimated_to_the_call(make_pipeline, config, make_calibration, clock, scheduler):
    pipeline, settings = make_pipeline(), make_calibration(num_inference_steps=5)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    clock.counts(pipeline.unet)
    bits = {"down_blocks.0.resnets.0.conv1": 2}
    estimated = estimate_time(pipeline, pipeline.unet, bits, settings)
    before = clock.calls
    quantize_model(pipeline, config, progress=False, calibration=settings)
    assert estimated.sampling == clock.calls - before
    assert before < clock.calls - before, "the trial must be shorter than the work"


def test_the_estimate_is_said_before_the_work_and_by_a_new_calibration_alone(
    make_pipeline, config, make_calibration, tmp_path, capsys
):
    settings = make_calibration(cache_dir=tmp_path / "cache", tuning_steps=1)
    quantize_model(make_pipeline(), config, calibration=settings)
    said = capsys.readouterr().err
    assert said.index("Calibration takes about") < said.index("Sampling, pass 1 of 1")
    assert "sampling" in said and "rounding" in said and ", tuning " in said
    quantize_model(make_pipeline(), config, calibration=settings)
    assert "Calibration takes" not in capsys.readouterr().err
    quantize_model(make_pipeline(), config, progress=False, calibration=make_calibration())
    assert "Calibration takes" not in capsys.readouterr().err


def test_parts_add_up_and_those_that_are_nothing_are_not_told():
    assert SamplingTime(once=2, call=3, order=1, more_calls=1).seconds(20) == 2 + 21 * 3
    assert str(CalibrationTime(60, 30, 0)) == "Calibration takes about 90 s: sampling 60 s, rounding 30 s."


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.9, "9.9 s"),
        (9.96, "10 s"),
        (119, "119 s"),
        (120, "2.0 min"),
        (7200, "2.0 hours"),
        (200_000, "2.3 days"),
        (9e7, "1042 days"),
    ],
)
def test_durations_have_two_digits(seconds, words):
    assert as_duration(seconds) == words
