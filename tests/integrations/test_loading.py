"""Quantizing while loading: every entry gives the same packed model."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    PipelineQuantizationConfig,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from helpers import all_packed_layers, packed_layers
from safetensors.torch import load_file
from single_file import write_single_file
from tiny import tiny_controlnet
from torch import nn

from diffusers_bitsfusion import BitsFusionConfig, BitsFusionConv2d, BitsFusionLinear, quantize_model

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    tensors, expected = one.state_dict(), other.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor.cpu(), expected[name].cpu()), name


@pytest.fixture(scope="module")
def source_pipe(source_folder):
    return StableDiffusionPipeline.from_pretrained(source_folder)


@pytest.fixture(scope="module")
def loaded_pipe(source_folder, make_config):
    return StableDiffusionPipeline.from_pretrained(source_folder, quantization_config=make_config())


@pytest.fixture
def fresh_unet(source_folder):
    return UNet2DConditionModel.from_pretrained(source_folder, subfolder="unet")


# Pipelines and models.


def test_a_pipeline_loads_with_every_unet_layer_packed(loaded_pipe):
    left = [
        name
        for name, m in loaded_pipe.unet.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and not isinstance(m, (BitsFusionLinear, BitsFusionConv2d))
    ]
    assert left == []
    assert len(packed_layers(loaded_pipe.unet)) > 50


def test_other_components_of_the_pipeline_are_untouched(loaded_pipe, source_pipe):
    assert_same_tensors(loaded_pipe.vae, source_pipe.vae)
    assert_same_tensors(loaded_pipe.text_encoder, source_pipe.text_encoder)
    assert not getattr(loaded_pipe.vae, "is_quantized", False)


def test_decoded_weights_are_near_the_source(loaded_pipe, source_pipe):
    for name, layer in all_packed_layers(loaded_pipe.unet).items():
        source = source_pipe.unet.get_submodule(name).weight.detach()
        step = layer.scale.view(torch.float32).view(-1, *[1] * (source.dim() - 1))
        # Within half a step inside the grid; beyond its end a weight is clipped.
        end = (2 ** (layer.bits - 1) if layer.bits < 8 else 127) * step
        off = (layer.weight - source.clamp(-end, end)).abs()
        assert (off <= step / 2 * 1.001 + 1e-7).all(), name


def test_a_model_loads_as_the_pipeline_loads_it(source_folder, make_config, loaded_pipe):
    unet = UNet2DConditionModel.from_pretrained(source_folder, subfolder="unet", quantization_config=make_config())
    assert_same_tensors(unet, loaded_pipe.unet)


def test_pipeline_quantization_config_quantizes_the_mapped_component(source_folder, make_config, loaded_pipe):
    config = PipelineQuantizationConfig(quant_mapping={"unet": make_config()})
    pipe = StableDiffusionPipeline.from_pretrained(source_folder, quantization_config=config)
    assert_same_tensors(pipe.unet, loaded_pipe.unet)
    assert not getattr(pipe.vae, "is_quantized", False)


def test_pipeline_quantization_config_gives_each_component_its_own(source_folder, make_config, loaded_pipe):
    mapping = {"unet": make_config(), "vae": BitsFusionConfig(recipe=4, components=["vae"])}
    config = PipelineQuantizationConfig(quant_mapping=mapping)
    pipe = StableDiffusionPipeline.from_pretrained(source_folder, quantization_config=config)
    assert_same_tensors(pipe.unet, loaded_pipe.unet)
    assert {layer.bits for layer in all_packed_layers(pipe.vae).values()} == {4}


def test_a_component_mapped_by_name_is_quantized_whatever_components_says(source_folder):
    config = PipelineQuantizationConfig(quant_mapping={"vae": BitsFusionConfig(recipe=4)})
    pipe = StableDiffusionPipeline.from_pretrained(source_folder, quantization_config=config)
    assert len(packed_layers(pipe.vae)) > 20
    assert not packed_layers(pipe.unet)


def test_a_vae_quantized_in_memory_reloads(source_pipe, tmp_path):
    vae = quantize_model(copy.deepcopy(source_pipe.vae), BitsFusionConfig(recipe=4), progress=False)
    vae.save_pretrained(tmp_path)
    assert_same_tensors(AutoencoderKL.from_pretrained(tmp_path), vae)


def test_components_chooses_what_is_quantized(source_folder, make_config, source_pipe):
    config = make_config(components=["vae"], target_bits=4)
    pipe = StableDiffusionPipeline.from_pretrained(source_folder, quantization_config=config)
    assert packed_layers(pipe.vae)
    assert_same_tensors(pipe.unet, source_pipe.unet)


def test_a_controlnet_is_a_model_of_its_own(tmp_path, make_config):
    tiny_controlnet().save_pretrained(tmp_path)
    loaded = ControlNetModel.from_pretrained(tmp_path, quantization_config=make_config())
    assert_same_tensors(loaded, quantize_model(tiny_controlnet(), make_config(), progress=False))


# quantize_model does what loading does.


def test_quantize_model_gives_the_codes_and_scales_of_loading(fresh_unet, make_config, loaded_pipe):
    assert quantize_model(fresh_unet, make_config(), progress=False) is fresh_unet
    assert_same_tensors(fresh_unet, loaded_pipe.unet)


def test_quantize_model_sets_the_attributes_of_loading(fresh_unet, make_config, loaded_pipe):
    unet = quantize_model(fresh_unet, make_config(), progress=False)
    loaded = loaded_pipe.unet
    assert unet.is_quantized and loaded.is_quantized
    assert unet.quantization_method == loaded.quantization_method == "bitsfusion"
    assert type(unet.hf_quantizer) is type(loaded.hf_quantizer)
    assert unet.hf_quantizer.pre_quantized == loaded.hf_quantizer.pre_quantized
    assert unet.config.quantization_config.to_dict() == loaded.config.quantization_config.to_dict()
    assert unet.config["_pre_quantization_dtype"] == torch.float32
    assert type(unet).__name__ == type(loaded).__name__ == "UNet2DConditionModel"
    assert set(vars(unet)) == set(vars(loaded))


def test_quantize_model_on_a_pipeline_quantizes_its_unet_only(source_folder, make_config, loaded_pipe, source_pipe):
    pipe = StableDiffusionPipeline.from_pretrained(source_folder)
    assert quantize_model(pipe, make_config(), progress=False) is pipe
    assert_same_tensors(pipe.unet, loaded_pipe.unet)
    assert_same_tensors(pipe.vae, source_pipe.vae)


def test_quantize_model_leaves_the_users_config_as_it_was(fresh_unet, make_config):
    config = make_config()
    before = copy.deepcopy(config.to_dict())
    quantize_model(fresh_unet, config, progress=False)
    assert config.to_dict() == before


def test_loading_leaves_the_users_config_as_it_was(source_folder, make_config):
    config = make_config()
    before = copy.deepcopy(config.to_dict())
    StableDiffusionPipeline.from_pretrained(source_folder, quantization_config=config)
    assert config.to_dict() == before


# Dtypes.


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_fly_loads_follow_the_asked_dtype(source_folder, make_config, call_unet, dtype):
    loaded = UNet2DConditionModel.from_pretrained(
        source_folder, subfolder="unet", quantization_config=make_config(), dtype=dtype
    )
    floats = {p.dtype for p in loaded.parameters() if p.is_floating_point()}
    assert floats == {dtype}
    assert loaded.dtype == dtype
    source = UNet2DConditionModel.from_pretrained(source_folder, subfolder="unet", dtype=dtype)
    assert_same_tensors(loaded, quantize_model(source, make_config(), progress=False))
    output = call_unet(loaded)
    assert output.dtype == dtype and output.isfinite().all()


@pytest.mark.parametrize("kind", ["keep", "table", "cache"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_loads_have_the_same_codes_and_scales_in_every_dtype(packed_folders, call_unet, kind, dtype):
    unet = UNet2DConditionModel.from_pretrained(packed_folders[kind], subfolder="unet", dtype=dtype)
    exact = UNet2DConditionModel.from_pretrained(packed_folders[kind], subfolder="unet")
    integers = [name for name, p in exact.named_parameters() if not p.is_floating_point()]
    tensors, expected = unet.state_dict(), exact.state_dict()
    assert all(torch.equal(tensors[name], expected[name]) for name in integers)
    assert all(tensors[name].dtype == dtype for name in tensors if name not in integers)
    dequantized = copy.deepcopy(unet).dequantize()
    assert {p.dtype for p in dequantized.parameters()} == {dtype}
    if kind == "keep" and dtype != torch.bfloat16:
        assert torch.equal(call_unet(unet), call_unet(dequantized))
    elif kind == "keep":  # in bf16 kernels of this package sum in another order than torch's
        in_fp32, errors = copy.deepcopy(dequantized).float(), torch.zeros(2)
        for timestep in range(1, 1000, 37):  # the errors of one input scatter
            wanted = call_unet(in_fp32, timestep)
            outputs = torch.stack([call_unet(model, timestep).float() for model in (unet, dequantized)])
            errors += (outputs - wanted).square().flatten(1).sum(dim=1)
        assert errors[0].sqrt() <= 1.02 * errors[1].sqrt()


def test_a_pipeline_loads_in_half_precision(packed_folders):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["keep"], dtype=torch.float16)
    assert pipe.unet.dtype == pipe.vae.dtype == torch.float16


# Exceptions to quantizing.


def test_modules_to_not_convert_stay_as_they_are(source_folder, make_config, source_pipe, tmp_path, call_unet):
    config = make_config(modules_to_not_convert=["attn2.to_k", "conv_out"])
    unet = UNet2DConditionModel.from_pretrained(source_folder, subfolder="unet", quantization_config=config)
    kept = [
        n for n, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n not in packed_layers(unet)
    ]
    assert "conv_out" in kept
    assert len(kept) > 1 and all(name == "conv_out" or name.endswith("attn2.to_k") for name in kept)
    for name in kept:
        assert torch.equal(unet.get_submodule(name).weight, source_pipe.unet.get_submodule(name).weight)
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert_same_tensors(again, unet)
    assert torch.equal(call_unet(again), call_unet(unet))


def test_a_part_of_the_time_embedding_left_alone_keeps_it(source_folder, make_config):
    config = make_config(modules_to_not_convert=["time_embedding"], time_embedding="table")
    unet = UNet2DConditionModel.from_pretrained(source_folder, subfolder="unet", quantization_config=config)
    assert type(unet.time_embedding.linear_1) is nn.Linear
    assert unet.config.quantization_config.time_embedding["type"] == "keep"


# Devices and memory.


def test_a_device_map_of_one_device_changes_nothing(source_folder, packed_folders, make_config, loaded_pipe):
    on_the_fly = UNet2DConditionModel.from_pretrained(
        source_folder, subfolder="unet", quantization_config=make_config(), device_map={"": "cpu"}
    )
    assert_same_tensors(on_the_fly, loaded_pipe.unet)
    packed = UNet2DConditionModel.from_pretrained(packed_folders["keep"], subfolder="unet", device_map={"": "cpu"})
    assert_same_tensors(packed, loaded_pipe.unet)


@pytest.mark.parametrize("kind", ["keep", "table", "cache"])
def test_a_packed_model_runs_from_disk(packed_folders, tmp_path, call_unet, kind):
    plain = UNet2DConditionModel.from_pretrained(packed_folders[kind], subfolder="unet")
    children = dict.fromkeys((name for name, _ in plain.named_children()), "cpu")
    device_map = children | {"time_proj": "disk", "up_blocks": "disk", "conv_in": "disk"}
    unet = UNet2DConditionModel.from_pretrained(
        packed_folders[kind], subfolder="unet", device_map=device_map, offload_folder=tmp_path
    )
    assert unet.conv_in.codes.is_meta and unet.up_blocks[0].resnets[0].conv1.codes.is_meta
    assert torch.equal(call_unet(unet), call_unet(plain))


@pytest.mark.parametrize("kind", ["keep", "table", "cache"])
def test_accelerate_offloading_does_not_change_outputs(packed_folders, tmp_path, call_unet, kind):
    unet = UNet2DConditionModel.from_pretrained(packed_folders[kind], subfolder="unet")
    expected = call_unet(unet)
    offloaded = accelerate.cpu_offload(copy.deepcopy(unet), execution_device=torch.device("cpu"))
    assert offloaded.conv_in.codes.is_meta
    assert torch.equal(call_unet(offloaded), expected)
    on_disk = accelerate.disk_offload(copy.deepcopy(unet), tmp_path, execution_device=torch.device("cpu"))
    assert on_disk.conv_in.codes.is_meta
    assert torch.equal(call_unet(on_disk), expected)


def test_offloaded_layers_still_answer_weight_within_their_hook(packed_folders):
    unet = UNet2DConditionModel.from_pretrained(packed_folders["keep"], subfolder="unet")
    expected = unet.conv_in.weight
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    hook = unet.conv_in._hf_hook
    hook.pre_forward(unet.conv_in)
    assert torch.equal(unet.conv_in.weight, expected)


def test_low_cpu_mem_usage_is_on_for_quantized_loads(source_folder, packed_folders, make_config, loaded_pipe):
    unet = UNet2DConditionModel.from_pretrained(
        source_folder, subfolder="unet", quantization_config=make_config(), low_cpu_mem_usage=True
    )
    assert_same_tensors(unet, loaded_pipe.unet)
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        UNet2DConditionModel.from_pretrained(packed_folders["keep"], subfolder="unet", low_cpu_mem_usage=False)


def test_a_sharded_source_quantizes_as_an_unsharded_one(source_pipe, tmp_path, make_config):
    source_pipe.unet.save_pretrained(tmp_path, max_shard_size="400KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for kind in ("keep", "table"):
        unet = UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=make_config(time_embedding=kind))
        expected = quantize_model(copy.deepcopy(source_pipe.unet), make_config(time_embedding=kind), progress=False)
        assert_same_tensors(unet, expected)


# Progress.


@pytest.fixture
def progress_bars():
    logging.enable_progress_bar()
    yield
    logging.disable_progress_bar()


def test_a_progress_bar_counts_the_layers_while_loading(source_folder, make_config, progress_bars, capsys):
    unet = UNet2DConditionModel.from_pretrained(source_folder, subfolder="unet", quantization_config=make_config())
    shown = capsys.readouterr().err
    count = len(packed_layers(unet))
    assert "Quantizing layers: 100%" in shown and f"{count}/{count}" in shown


def test_quantize_model_shows_progress_unless_told_not_to(fresh_unet, make_config, progress_bars, capsys):
    other = copy.deepcopy(fresh_unet)
    quantize_model(fresh_unet, make_config())
    assert "Quantizing layers: 100%" in capsys.readouterr().err
    quantize_model(other, make_config(), progress=False)
    assert "Quantizing layers" not in capsys.readouterr().err


def test_loading_a_packed_model_does_not_quantize_again(packed_folders, progress_bars, capsys):
    UNet2DConditionModel.from_pretrained(packed_folders["keep"], subfolder="unet")
    assert "Quantizing layers" not in capsys.readouterr().err


# Single files with the names of the original Stable Diffusion code.


@pytest.fixture(scope="module")
def ldm(tmp_path_factory):
    """(pipeline folder, single file) of the same weights."""
    folder, file = tmp_path_factory.mktemp("ldm"), tmp_path_factory.mktemp("single") / "model.safetensors"
    write_single_file(folder, tmp_path_factory.mktemp("ldm-tokenizer"), file)
    return folder, file


def test_the_single_file_of_these_tests_is_one_that_diffusers_reads(ldm):
    folder, file = ldm
    assert all(name.startswith(("model.", "first_stage_model.", "cond_stage_model.")) for name in load_file(file))
    pipe = StableDiffusionPipeline.from_single_file(file, config=str(folder), local_files_only=True)
    expected = StableDiffusionPipeline.from_pretrained(folder)
    for component in ("unet", "vae", "text_encoder"):
        assert_same_tensors(getattr(pipe, component), getattr(expected, component))


@pytest.mark.parametrize("kind", ["keep", "table", "cache"])
def test_a_model_from_a_single_file_equals_the_one_from_its_folder(ldm, make_config, call_unet, kind):
    folder, file = ldm
    config = make_config(time_embedding=kind)
    unet = UNet2DConditionModel.from_single_file(
        str(file), config=str(folder), subfolder="unet", local_files_only=True, quantization_config=config
    )
    expected = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", quantization_config=config)
    assert_same_tensors(unet, expected)
    assert unet.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()
    assert torch.equal(call_unet(unet), call_unet(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pipeline_from_a_single_file_quantizes_the_unet_only(ldm, make_config, dtype):
    folder, file = ldm
    pipe = StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, quantization_config=make_config(), dtype=dtype
    )
    expected = StableDiffusionPipeline.from_pretrained(folder, quantization_config=make_config(), dtype=dtype)
    assert_same_tensors(pipe.unet, expected.unet)
    assert_same_tensors(pipe.vae, expected.vae)
    assert_same_tensors(pipe.text_encoder, expected.text_encoder)
    assert not packed_layers(pipe.vae)


def test_a_pipeline_from_a_single_file_saves_reloads_and_samples(ldm, make_config, tmp_path):
    folder, file = ldm
    pipe = StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, quantization_config=make_config()
    )
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert_same_tensors(again.unet, pipe.unet)
    assert_same_tensors(again.vae, pipe.vae)
    images = []
    for candidate in (pipe, again):
        candidate.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
        images.append(candidate("ab", generator=generator, **arguments).images)
    assert images[0].isfinite().all() and torch.equal(*map(torch.as_tensor, images))


def test_the_vae_from_a_single_file_is_not_marked_as_quantized(ldm, make_config):
    folder, file = ldm
    pipe = StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, quantization_config=make_config()
    )
    assert not getattr(pipe.vae, "is_quantized", False)
    assert "quantization_config" not in pipe.vae.config
    assert pipe.vae.to(torch.float16).dtype == torch.float16
