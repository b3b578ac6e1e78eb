"""Sampling and training with packed weights: schedulers, time features, decoding only where needed, gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from helpers import relative_error
from tiny import tiny_pipeline, tiny_unet
from torch import Tensor, nn

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.nn import PackedWeight
from diffusers_bitsfusion.ops import conv, linear, transforms

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULERS = {
    "PNDM": (PNDMScheduler, {}),
    "DDIM": (DDIMScheduler, {}),
    "DDIM trailing": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler at fractional steps": (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "Euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "UniPC": (UniPCMultistepScheduler, {}),
}
TIME_LAYERS = ["time_embedding", "time_emb_proj"]


def load_pipeline(folder) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_latents(pipe: StableDiffusionPipeline, steps: int) -> Tensor:
    """Final latents."""
    generator = torch.Generator().manual_seed(0)
    return pipe("ab", num_inference_steps=steps, height=16, width=16, generator=generator, output_type="latent").images


# Schedulers.


@pytest.fixture(scope="module")
def table_pipe(packed_folders) -> StableDiffusionPipeline:
    return load_pipeline(packed_folders["table"])


@pytest.fixture(scope="module")
def dequantized_pipe(packed_folders) -> StableDiffusionPipeline:
    """The same pipeline with a dequantized UNet, whose time embedding is a module again."""
    pipe = load_pipeline(packed_folders["table"])
    pipe.unet.dequantize()
    return pipe


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_table_serves_any_scheduler_at_any_number_of_steps(table_pipe, dequantized_pipe, scheduler, steps):
    kind, settings = SCHEDULERS[scheduler]
    for pipe in (table_pipe, dequantized_pipe):
        pipe.scheduler = kind.from_config(PNDMScheduler.from_config(pipe.scheduler.config).config, **settings)
    latents = sample_latents(table_pipe, steps)
    assert latents.isfinite().all()
    assert relative_error(latents, sample_latents(dequantized_pipe, steps)) < 0.01


def test_images_come_out_of_a_packed_pipeline(packed_folders):
    image = load_pipeline(packed_folders["keep"])("ab", num_inference_steps=2, height=16, width=16).images[0]
    assert image.size == (16, 16)


# Time features.


def exact_features(unet: nn.Module, timesteps: Tensor) -> Tensor:
    """What the blocks of an unquantized UNet compute from the timestep."""
    embedding = F.silu(unet.time_embedding(unet.time_proj(timesteps)))
    blocks = [m for m in unet.modules() if hasattr(m, "time_emb_proj")]
    return torch.cat([block.time_emb_proj(embedding) for block in blocks], dim=1)


def features_in_use(unet: nn.Module, timesteps: Tensor) -> Tensor:
    """What the blocks of a UNet with looked-up features get."""
    looked_up = unet.time_embedding(unet.time_proj(timesteps))
    blocks = [m for m in unet.modules() if hasattr(m, "time_emb_proj")]
    return torch.cat([block.time_emb_proj(looked_up) for block in blocks], dim=1)


@pytest.mark.parametrize("changes", [{}, {"flip_sin_to_cos": False, "freq_shift": 1}])
@torch.no_grad()
def test_the_table_is_accurate_at_whole_and_at_half_steps(changes, make_config):
    source = tiny_unet(**changes)
    unet = quantize_model(copy.deepcopy(source), make_config(time_embedding="table"), progress=False)
    whole, half = torch.arange(1001.0), torch.arange(1000.0) + 0.5
    assert relative_error(features_in_use(unet, whole), exact_features(source, whole)) < 0.005
    assert relative_error(features_in_use(unet, half), exact_features(source, half)) < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_the_table_tells_high_timesteps_apart_in_half_precision(dtype, make_config):
    unet = quantize_model(tiny_unet().to(dtype), make_config(time_embedding="table"), progress=False)
    timesteps = torch.tensor([996, 997, 998, 999])  # bf16 would make 996 and 1000 of them
    features = features_in_use(unet, timesteps)
    assert len(features.unique(dim=0)) == 4
    assert relative_error(features, exact_features(tiny_unet().to(dtype).float(), timesteps)) < 0.01


@pytest.fixture(scope="module")
def cached_and_exact() -> tuple[nn.Module, nn.Module]:
    """UNets of the same codes: one with cached features, one with the original time embedding in fp32."""
    cached = quantize_model(tiny_unet(), BitsFusionConfig(recipe=3, time_embedding="cache"), progress=False)
    config = BitsFusionConfig(recipe=3, time_embedding="keep", modules_to_not_convert=TIME_LAYERS)
    return cached, quantize_model(tiny_unet(), config, progress=False)


def test_cached_features_equal_the_exact_time_embedding_to_half_precision(cached_and_exact, call_unet):
    cached, exact = cached_and_exact
    for timestep in (1, 501, 981):
        output = call_unet(cached, timestep=timestep)
        assert 0 < relative_error(output, call_unet(exact, timestep=timestep)) < 1e-3


@torch.no_grad()
def test_cached_features_are_those_of_the_original_in_half_precision(cached_and_exact):
    cached, _ = cached_and_exact
    timesteps = torch.tensor([1, 21, 981])
    expected = exact_features(tiny_unet(), timesteps)
    torch.testing.assert_close(features_in_use(cached, timesteps), expected, rtol=6e-4, atol=1e-6)


def test_a_cached_pipeline_runs_its_own_fifty_steps(cached_and_exact, tmp_path):
    latents = []
    pipe = tiny_pipeline(tmp_path)
    for unet in cached_and_exact:
        pipe.unet = unet
        latents.append(sample_latents(pipe, 50))
    assert latents[0].isfinite().all()
    assert relative_error(*latents) < 0.01


def test_a_cache_of_given_timesteps_runs_their_scheduler(make_config, tmp_path):
    pipe = tiny_pipeline(tmp_path)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(7)
    timesteps = sorted(set(pipe.scheduler.timesteps.tolist()))
    config = make_config(time_embedding={"type": "cache", "timesteps": timesteps})
    pipe.unet = quantize_model(tiny_unet(), config, progress=False)
    assert sample_latents(pipe, 7).isfinite().all()


@pytest.mark.parametrize("timestep", [501, torch.tensor(501), torch.tensor([501, 501]), torch.tensor([501.0])])
@pytest.mark.parametrize("kind", ["table", "cache"])
def test_timesteps_come_in_every_form_that_diffusers_accepts(packed_folders, call_unet, kind, timestep):
    unet = load_pipeline(packed_folders[kind]).unet
    assert torch.equal(call_unet(unet, timestep=timestep), call_unet(unet, timestep=501))


def test_a_batch_may_hold_different_timesteps(table_pipe, call_unet):
    unet = table_pipe.unet
    both = call_unet(unet, timestep=torch.tensor([21, 981]))
    torch.testing.assert_close(both[0], call_unet(unet, timestep=21)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[1], call_unet(unet, timestep=981)[1], rtol=1e-4, atol=1e-5)


# Decoding.


@pytest.fixture
def decodes(monkeypatch) -> dict[str, list[int]]:
    """Addresses of the codes in the order of their decoding: for reading `weight`, and for a call."""
    seen: dict[str, list[int]] = {"read": [], "call": []}
    for module, name, calls in (
        (transforms, "decode_weight", seen["read"]),
        (linear, "decode_to_scratch", seen["call"]),
        (conv, "decode_to_scratch", seen["call"]),
    ):
        original = getattr(module, name)

        def counting(codes, *args, original=original, calls=calls):
            calls.append(codes.data_ptr())
            return original(codes, *args)

        monkeypatch.setattr(module, name, counting)
    return seen


def test_the_counter_sees_a_weight_being_read(packed_unet, decodes):
    assert packed_unet.conv_in.weight.shape == (32, 4, 3, 3)
    assert decodes["read"] == []
    packed_unet.conv_in.weight.clone()
    assert decodes["read"] == [packed_unet.conv_in.codes.data_ptr()]


@pytest.mark.parametrize("kind", ["keep", "table"])
def test_sampling_reads_no_weight_and_decodes_each_layer_once_a_step(packed_folders, decodes, kind):
    pipe = load_pipeline(packed_folders[kind])
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    layers = [m for m in pipe.unet.modules() if isinstance(m, PackedWeight)]
    sample_latents(pipe, 2)
    assert decodes["read"] == []
    counts = [decodes["call"].count(layer.codes.data_ptr()) for layer in layers]
    assert counts == [2] * len(layers)


def test_bookkeeping_reads_no_weight(packed_folders, decodes, tmp_path):
    pipe = load_pipeline(packed_folders["keep"])
    pipe.to("cpu")
    pipe.unet.save_pretrained(tmp_path)
    copy.deepcopy(pipe.unet)
    repr(pipe.unet)
    assert pipe.unet.dtype == torch.float32 and pipe.unet.num_parameters() > 0
    assert decodes == {"read": [], "call": []}


# Gradients.


def training_step(unet: nn.Module) -> dict[str, Tensor]:
    """Loss and gradients, by name, of the inputs and of every parameter that takes one."""
    generator = torch.Generator().manual_seed(11)
    sample = torch.randn(2, 4, 8, 8, generator=generator, requires_grad=True)
    states = torch.randn(2, 5, 32, generator=generator, requires_grad=True)
    target = torch.randn(2, 4, 8, 8, generator=generator)
    unet.zero_grad()
    loss = F.mse_loss(unet(sample, 501, states).sample, target)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    return gradients | {"loss": loss.detach(), "sample": sample.grad, "states": states.grad}


@pytest.fixture
def both_unets(packed_unet) -> tuple[nn.Module, nn.Module]:
    """A packed UNet and its dequantized copy."""
    return packed_unet, copy.deepcopy(packed_unet).dequantize()


def assert_same_step(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert {"loss", "sample", "states", "conv_norm_out.weight", "conv_in.bias"} <= gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name


def test_gradients_of_inputs_biases_and_norms_are_those_of_the_dequantized_model(both_unets):
    packed, plain = (training_step(unet) for unet in both_unets)
    assert_same_step(packed, plain)
    assert {name for name in plain if name not in packed} == {
        f"{name}.weight" for name, m in both_unets[0].named_modules() if isinstance(m, PackedWeight)
    }


def test_gradients_survive_checkpointing(both_unets):
    expected = training_step(both_unets[1])
    both_unets[0].train()
    both_unets[0].enable_gradient_checkpointing()
    assert_same_step(training_step(both_unets[0]), expected)


def test_frozen_layers_still_pass_gradients_to_the_input(both_unets):
    expected = training_step(both_unets[1])
    both_unets[0].requires_grad_(False)
    gradients = training_step(both_unets[0])
    assert gradients.keys() == {"loss", "sample", "states"}
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name


def test_a_training_step_lowers_the_loss_and_leaves_codes_and_scales(packed_unet):
    before = {name: p.clone() for name, p in packed_unet.named_parameters() if not p.is_floating_point()}
    optimizer = torch.optim.SGD([p for p in packed_unet.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        losses.append(float(training_step(packed_unet)["loss"]))
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    after = dict(packed_unet.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_autocast_computes_as_on_the_dequantized_model(both_unets, call_unet):
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = (call_unet(unet) for unet in both_unets)
    assert output.dtype == expected.dtype
    assert relative_error(output.float(), expected.float()) < 0.02
    assert not torch.equal(output.float(), call_unet(both_unets[0]))


def test_gradients_under_autocast_are_near_those_of_the_dequantized_model(both_unets):
    with torch.autocast("cpu", torch.bfloat16):
        packed, plain = (training_step(unet) for unet in both_unets)
    assert relative_error(packed["sample"], plain["sample"]) < 0.05
    assert relative_error(packed["states"], plain["states"]) < 0.05


def test_inference_mode_and_training_may_alternate(packed_unet, call_unet):
    before = training_step(packed_unet)["sample"]
    with torch.inference_mode():
        call_unet(packed_unet)
    assert torch.equal(training_step(packed_unet)["sample"], before)
