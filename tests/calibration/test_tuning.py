"""Tuning what stays in floating point: gains and offsets, folded; the error they mend; interruption; memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_bitsfusion import quantize_model
from diffusers_bitsfusion.calibration import run as calibration_run
from diffusers_bitsfusion.calibration import tuning
from diffusers_bitsfusion.calibration.activation_memory import saved_bytes
from diffusers_bitsfusion.calibration.calls import Call, recording
from diffusers_bitsfusion.calibration.denoising import Denoising
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.nn.conversion import pack_weight, packed_from_float


def packed(layer):
    packed = packed_from_float(layer, 2, torch.float32)
    pack_weight(packed, layer.weight.detach(), Rounding(iterations=3))
    return packed


MODULES = {
    "convolution": (lambda: packed(nn.Conv2d(3, 5, 3, padding=1)), (2, 3, 6, 6), 1),
    "convolution without a bias": (lambda: packed(nn.Conv2d(3, 5, 1, bias=False)), (2, 3, 6, 6), 1),
    "linear layer": (lambda: packed(nn.Linear(4, 6)), (2, 7, 4), -1),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 5, 5), 1),
    "layer norm": (lambda: nn.LayerNorm(8), (2, 3, 8), -1),
    "layer norm without a bias": (lambda: nn.LayerNorm(8, bias=False), (2, 3, 8), -1),
}


@pytest.mark.parametrize("kind", MODULES)
@torch.no_grad()
def test_gain_and_offset_are_those_of_an_output_channel_and_fold_exactly(kind):
    make, shape, axis = MODULES[kind]
    torch.manual_seed(0)
    module, x = make(), torch.randn(shape)
    plain = module(x)
    channels = tuning.Channels(module)
    channels.spread = 1.5
    channels.gain.normal_(1, 0.2)
    shift = torch.zeros_like(channels.gain)
    if channels.offset is not None:
        shift = 1.5 * channels.offset.normal_()
    expected = plain.movedim(axis, -1) * channels.gain + shift
    torch.testing.assert_close(channels(module, (x,), plain).movedim(axis, -1), expected)
    channels.fold()
    torch.testing.assert_close(module(x).movedim(axis, -1), expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_gain_and_offset_are_those_of_the_formula():
    torch.manual_seed(0)
    y, gain, offset = torch.randn(2, 3, 4, 4), torch.randn(1, 3, 1, 1), torch.randn(1, 3, 1, 1)
    upstream = torch.randn_like(y)

    def gradients(function):
        leaves = [tensor.clone().requires_grad_() for tensor in (y, gain, offset)]
        return torch.autograd.grad(function(*leaves), leaves, upstream)

    expected = gradients(lambda y, gain, offset: y * gain + offset)
    for found, wanted in zip(gradients(tuning._Scaled.apply), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.fixture
def tuned(make_pipeline, config, make_calibration):
    """Calibrates and tunes a fresh pipeline and gives its UNet."""

    def tune(dtype=torch.float32, **changes):
        pipeline = make_pipeline().to(dtype)
        calibration = make_calibration(**({"tuning_steps": 10} | changes))
        return quantize_model(pipeline, config, progress=False, calibration=calibration).unet

    return tune


def test_the_noise_of_the_calls_tuned_on_comes_closer(make_pipeline, tuned, make_calibration):
    pipeline = make_pipeline()
    denoising = Denoising(pipeline, pipeline.unet, make_calibration())
    with recording(pipeline.unet) as calls:
        for batch in range(3):
            denoising._sample(batch)

    @torch.no_grad()
    def error(unet):
        return sum(float(F.mse_loss(call.repeat(unet), call.output)) for call in calls)

    unet = tuned(tuning_steps=0)
    before = error(unet)
    tuning.tune(unet, calls, 25, progress=False)
    assert error(unet) < 0.8 * before


def test_the_noise_comes_closer_on_unseen_images_and_codes_stay(make_pipeline, tuned, make_calibration):
    pipeline = make_pipeline()
    denoising = Denoising(pipeline, pipeline.unet, make_calibration(seed=1))
    calls = [call for batch in range(3) for call in denoising.record(batch, 3)]

    @torch.no_grad()
    def error(unet):
        errors = [(call.repeat(unet) - call.output).square().mean(dim=(1, 2, 3)) for call in calls]
        # By logarithms, so that each sample counts by what its error changes in proportion.
        return float(torch.cat(errors).log().mean().exp())

    before, after = tuned(tuning_steps=0), tuned(tuning_steps=60)
    assert error(after) < 0.9 * error(before)
    codes = [name for name, _ in before.named_parameters() if name.endswith(".codes")]
    assert codes and all(torch.equal(before.get_parameter(name), after.get_parameter(name)) for name in codes)
    for name, parameter in after.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == before.get_parameter(name).requires_grad
    assert after.config.quantization_config.calibration["tuning_steps"] == 60


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_what_it_is(tuned, dtype):
    unet = tuned(dtype, tuning_steps=2)
    assert {p.dtype for p in unet.parameters() if p.is_floating_point()} == {dtype}
    assert unet.dtype == dtype


@pytest.mark.parametrize("supported", [True, False])
def test_half_precision_is_computed_in_bf16_where_the_processor_has_it(tuned, monkeypatch, supported):
    seen, repeat = [], Call.repeat

    def watched(call, model):
        seen.append(torch.is_autocast_enabled("cpu"))
        return repeat(call, model)

    monkeypatch.setattr(Call, "repeat", watched)
    monkeypatch.setattr(tuning, "has_bf16", lambda device: supported)
    tuned(torch.float16, tuning_steps=1)
    assert seen and any(seen) == supported


def test_an_interrupted_run_goes_on_where_it_stopped(tuned, monkeypatch, tmp_path, equal_models):
    monkeypatch.setattr(calibration_run, "_SAVE_EVERY", 0)
    whole = tuned()
    schedule, steps = tuning._schedule, []

    def interrupting(step, count):
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(step)
        return schedule(step, count)

    with monkeypatch.context() as patched:
        patched.setattr(tuning, "_schedule", interrupting)
        with pytest.raises(KeyboardInterrupt):
            tuned(cache_dir=tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(tuning, "_schedule", lambda *given: steps.append(given[0]) or schedule(*given))
        patched.setattr(Denoising, "_sample", None)
        resumed = tuned(cache_dir=tmp_path / "cache")
    assert steps == list(range(10))
    assert equal_models(resumed, whole)


def test_another_number_of_steps_starts_anew(tuned, tmp_path, equal_models):
    fresh = tuned(tuning_steps=5)
    tuned(cache_dir=tmp_path / "cache")
    assert equal_models(tuned(cache_dir=tmp_path / "cache", tuning_steps=5), fresh)


def test_bytes_kept_for_a_backward_pass_are_counted_once():
    layer = nn.Linear(100, 50)
    x = torch.randn(20, 100, requires_grad=True)
    counted = saved_bytes(layer, lambda: (F.silu(h := layer(x)) * h.detach()).sum())
    assert counted == 4 * (20 * 100 + 20 * 50), "x, h (by two operations); not the weight"


def test_little_memory_checkpoints_gradients_and_gives_the_same(make_pipeline, config, make_calibration):
    def tune(memory):
        pipeline = make_pipeline()
        with recording(pipeline.unet) as calls:
            Denoising(pipeline, pipeline.unet, make_calibration())._sample(0)
        quantize_model(pipeline, config, progress=False)
        used = []
        enable = pipeline.unet.enable_gradient_checkpointing
        pipeline.unet.enable_gradient_checkpointing = lambda: used.append(True) or enable()
        tuning.tune(pipeline.unet, calls, 3, memory=memory, progress=False)
        assert not pipeline.unet.is_gradient_checkpointing
        return pipeline.unet, used

    (plain, unused), (bounded, used) = tune(1e9), tune(1e3)
    assert used and not unused
    for name, value in plain.state_dict().items():
        other = bounded.state_dict()[name]
        torch.testing.assert_close(
            other.view(torch.float32) if name.endswith(".scale") else other,
            value.view(torch.float32) if name.endswith(".scale") else value,
        )


def test_without_gradient_checkpointing_too_little_memory_is_an_error():
    model = packed(nn.Linear(4, 4))
    call = Call((torch.randn(8, 4),), {}, torch.randn(1, 8, 4))
    with pytest.raises(ValueError, match=r"no gradient checkpointing\. Lower batch_size or raise memory_gb"):
        tuning.tune(model, [call], 1, memory=1, progress=False)


def test_a_loss_that_is_not_finite_is_an_error():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = packed(nn.Linear(4, 4))

        def forward(self, x):
            return (self.layer(x),)

    call = Call((torch.full((2, 4), torch.nan),), {}, torch.ones(2, 4))
    with pytest.raises(ValueError, match="The loss is nan in step 1 of tuning"):
        tuning.tune(Model(), [call], 2, progress=False)
