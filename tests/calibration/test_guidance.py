"""Guidance kept while tuning: targets, how they follow what predictions lack, and what a model then keeps."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusers_bitsfusion import quantize_model
from diffusers_bitsfusion.calibration import tuning
from diffusers_bitsfusion.calibration.calls import Call
from diffusers_bitsfusion.calibration.denoising import Denoising
from diffusers_bitsfusion.calibration.guidance import Guidance


@pytest.fixture
def call():
    generator = torch.Generator().manual_seed(0)
    output, added = torch.randn(2, 3, 4, 4, 4, generator=generator).unbind()
    return Call((), {}, output, added)


def _along(error, added):
    return (error * added).flatten(1).sum(1).view(-1, 1, 1, 1)


def test_a_call_without_guidance_is_predicted_as_it_is(call):
    guidance, plain = Guidance(), replace(call, guidance=None)
    guidance.observe(call.output + 1, plain)
    guidance.step()
    assert guidance.target(plain) is call.output and guidance.surplus == 0


def test_a_twentieth_of_the_lost_share_is_added(call):
    guidance = Guidance()
    # An error across the text's part is none of it.
    across = torch.randn(call.output.shape, generator=torch.Generator().manual_seed(1))
    across -= _along(across, call.guidance) / _along(call.guidance, call.guidance) * call.guidance
    guidance.observe(call.output - 0.3 * call.guidance + across, call)
    guidance.step()
    assert guidance.surplus == pytest.approx(0.05 * 0.3, rel=1e-4)
    torch.testing.assert_close(guidance.target(call), call.output + 0.015 * call.guidance)
    guidance.observe(call.output + 0.1 * call.guidance, call)
    guidance.step()
    assert guidance.surplus == pytest.approx(0.05 * (0.3 - 0.1), rel=1e-4)


def test_rows_count_by_the_inverse_of_their_error(call):
    guidance = Guidance()
    errors = np.random.default_rng(0).standard_normal(call.output.shape)
    errors = (errors * np.array([0.1, 1, 10]).reshape(-1, 1, 1, 1)).astype(np.float32)
    added = call.guidance.double().numpy()
    weights = 1 / np.square(errors).mean((1, 2, 3))
    along = (errors * added).sum((1, 2, 3)) @ weights
    for row in range(3):  # in one call or in several
        part = replace(call, output=call.output[row : row + 1], guidance=call.guidance[row : row + 1])
        guidance.observe(part.output + torch.from_numpy(errors[row : row + 1]), part)
    guidance.step()
    expected = -0.05 * along / (np.square(added).sum((1, 2, 3)) @ weights)
    assert guidance.surplus == pytest.approx(expected, rel=1e-5)
    guidance = Guidance()
    guidance.observe(call.output + torch.from_numpy(errors), call)
    guidance.step()
    assert guidance.surplus == pytest.approx(expected, rel=1e-5)


def test_predictions_that_shrink_it_come_to_keep_all(call):
    guidance = Guidance()
    for _ in range(400):
        target = guidance.target(call)
        predicted = target - 0.2 * (target - (call.output - call.guidance))  # 0.8 of the text's part in the target
        guidance.observe(predicted, call)
        guidance.step()
    torch.testing.assert_close(predicted, call.output, rtol=1e-4, atol=1e-4)
    assert guidance.surplus == pytest.approx(0.25, rel=1e-3)


def test_a_tuned_model_keeps_more_of_it(make_pipeline, config, make_calibration):
    pipeline = make_pipeline()
    calls = Denoising(pipeline, pipeline.unet, make_calibration(batch_size=3)).record(0, 40)
    rounded = quantize_model(pipeline, config, progress=False).unet

    def lost(keeps):
        unet = copy.deepcopy(rounded)
        tuning.tune(unet, calls if keeps else [replace(call, guidance=None) for call in calls], 60, progress=False)
        with torch.no_grad():
            along = sum(float(((call.repeat(unet) - call.output) * call.guidance).sum()) for call in calls)
        return along / sum(float(call.guidance.square().sum()) for call in calls)

    assert abs(lost(True)) < 0.5 * abs(lost(False))
