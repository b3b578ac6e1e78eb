"""Calls on noisy latents: the noise schedule's formula, timesteps by Beta(3, 1) or the known ones; what cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from torch import nn

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.calibration.calls import Call
from diffusers_bitsfusion.calibration.denoising import Denoising
from diffusers_bitsfusion.calibration.folder import TuningFolder
from diffusers_bitsfusion.calibration.noisy_calls import NoisyCalls

LATENTS = torch.full((2, 4, 3, 3), 2.0)


class Model(nn.Module):
    """Predicts what it is given, plus the timestep and what stands for the text."""

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep, encoder_hidden_states=None):
        return (sample + (timestep + encoder_hidden_states).view(-1, 1, 1, 1),)


def conditional_call():
    text = torch.tensor([-1.0, -2.0, 1.0, 2.0])
    return Call((torch.zeros(4, 4, 3, 3), torch.tensor(500)), {"encoder_hidden_states": text}, torch.zeros(4, 4, 3, 3))


def repeated(noisy, count):
    return [noisy.repeat(conditional_call(), LATENTS, Model()) for _ in range(count)]


def arguments(call):
    kwargs = call.to(torch.device("cpu")).kwargs
    return [kwargs[name] for name in ("sample", "timestep", "encoder_hidden_states")]


def test_noise_is_added_to_rows_by_the_schedule_and_predicted():
    scheduler = DDIMScheduler()
    betas = np.linspace(0.0001, 0.02, 1000)
    alpha_bar = np.cumprod(1 - betas)
    noise = []
    for call in repeated(NoisyCalls(scheduler, seed=0), 200):
        sample, timesteps, text = arguments(call)
        assert timesteps.shape == (4,) and not timesteps.is_floating_point()
        known = alpha_bar[timesteps.numpy()].reshape(-1, 1, 1, 1)
        noise.append((sample.numpy() - np.sqrt(known) * 2.0) / np.sqrt(1 - known))
        expected = sample + (timesteps + text).view(-1, 1, 1, 1)
        torch.testing.assert_close(call.output, expected)
    noise = np.stack(noise)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    rows = noise.transpose(1, 0, 2, 3, 4).reshape(4, -1)
    assert np.abs(np.corrcoef(rows) - np.eye(4)).max() < 0.05, "rows have noise of their own"


def test_under_guidance_a_tenth_of_the_rows_is_unconditional_and_the_others_have_the_text_of_their_image():
    text = torch.stack([arguments(call)[2] for call in repeated(NoisyCalls(DDIMScheduler(), 0), 1000)])
    assert torch.equal(text.abs(), torch.tensor([1.0, 2.0, 1.0, 2.0]).expand(1000, 4))
    assert ((text < 0).float().mean(dim=0) - 0.1).abs().max() < 0.03


def test_what_the_text_adds_is_told_for_the_same_noise():
    for call in repeated(NoisyCalls(DDIMScheduler(), 0), 20):
        text = arguments(call)[2]
        added = torch.where(text > 0, 2 * text, 0)  # texts are 1 and 2, without they are -1 and -2
        torch.testing.assert_close(call.guidance, added.view(-1, 1, 1, 1).expand(4, 4, 3, 3), rtol=0, atol=1e-3)


def test_calls_share_their_text_in_memory_and_in_the_folder(tmp_path):
    noisy, template = NoisyCalls(DDIMScheduler(), 0), conditional_call()
    calls = [noisy.repeat(template, LATENTS, Model()) for _ in range(3)]
    folder = TuningFolder(tmp_path, 1, None)
    folder.save_calls(0, calls)
    for found in (calls, folder.load_calls(0)):
        assert len({call.shared["encoder_hidden_states"].data_ptr() for call in found}) == 1
        for call, expected in zip(found, calls, strict=True):
            assert torch.equal(call.repeat(Model()), expected.output)
            assert torch.equal(call.guidance, expected.guidance)


def test_without_guidance_rows_keep_what_they_were_given():
    text = torch.tensor([-1.0, 2.0])
    call = Call((torch.zeros(2, 4, 3, 3), torch.tensor(500)), {"encoder_hidden_states": text}, torch.zeros(2, 4, 3, 3))
    noisy = NoisyCalls(DDIMScheduler(), 0).repeat(call, LATENTS, Model())
    assert torch.equal(arguments(noisy)[2], text) and noisy.guidance is None


def test_timesteps_are_beta_3_1():
    calls = repeated(NoisyCalls(DDIMScheduler(), seed=1), 1000)
    timesteps = np.concatenate([arguments(call)[1].numpy() for call in calls])
    levels = np.array([200, 400, 600, 800])
    below = (timesteps[:, None] < levels).mean(axis=0)
    np.testing.assert_allclose(below, (levels / 1000) ** 3, atol=0.03)
    assert timesteps.min() >= 0 and timesteps.max() == 999


def test_only_timesteps_that_the_quantized_model_knows():
    known = [1.0, 400.0, 990.0]
    timesteps = torch.cat([arguments(call)[1] for call in repeated(NoisyCalls(DDIMScheduler(), 0, known), 100)])
    assert set(timesteps.tolist()) == {1, 400, 990}


def test_the_seed_decides():
    one, same, other = (repeated(NoisyCalls(DDIMScheduler(), seed), 2) for seed in (3, 3, 4))
    assert all(torch.equal(arguments(a)[0], arguments(b)[0]) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(arguments(a)[0], arguments(b)[0]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("scheduler", [PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_noise_is_added_to_images_as_often_as_requested(make_pipeline, make_calibration, scheduler):
    pipeline = make_pipeline()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    calls = Denoising(pipeline, pipeline.unet, make_calibration()).record(0, 5)
    sampled = Denoising(pipeline, pipeline.unet, make_calibration())._sample(0)
    assert len(calls) == 5
    for call in calls:
        assert arguments(call)[0].shape == (2, *sampled.shape[1:])
        torch.testing.assert_close(call.repeat(pipeline.unet), call.output)


def test_a_model_whose_features_are_cached_sees_their_timesteps(make_pipeline, make_calibration, tmp_path):
    # Calls at the first two, still in the folder, would be refused by the second model.
    for timesteps in ([1, 501], [7]):
        config = BitsFusionConfig(recipe=2, time_embedding={"type": "cache", "timesteps": timesteps})
        calibration = make_calibration(num_samples=1, tuning_steps=2, cache_dir=tmp_path / "cache")
        unet = quantize_model(make_pipeline(), config, progress=False, calibration=calibration).unet
        assert unet.time_proj.known_timesteps == timesteps


def test_a_scheduler_without_a_noise_schedule_is_said_before_anything_is_sampled(
    make_pipeline, config, make_calibration
):
    pipeline = make_pipeline()
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(
        ValueError, match=r"FlowMatchEulerDiscreteScheduler has no alphas_cumprod.*Leave tuning_steps 0"
    ):
        quantize_model(pipeline, config, progress=False, calibration=make_calibration(tuning_steps=2))


def test_a_model_with_more_inputs_than_the_latents_is_named():
    call = Call((torch.zeros(4, 9, 3, 3), torch.tensor(500)), {}, torch.zeros(4, 4, 3, 3))
    with pytest.raises(ValueError, match=r"latents \[4, 3, 3\], but Model takes \[9, 3, 3\]"):
        NoisyCalls(DDIMScheduler(), 0).repeat(call, LATENTS, Model())
