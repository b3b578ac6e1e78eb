"""Every option of diffusers and accelerate that saves memory, on packed models: the picture stays the same.

The accelerator is the CPU itself here: the hooks that move weights run all the same, from and to the same place.
Loading a model in parts (device maps, disk, shards) is in test_loading.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers import all_packed_layers
from tiny import tiny_lora
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(params=["keep", "table"])
def folder(request, packed_folders) -> Path:
    return packed_folders[request.param]


def load(folder: Path, **arguments) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_images(pipe: StableDiffusionPipeline) -> Tensor:
    arguments = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
    return pipe("ab", generator=torch.Generator().manual_seed(1), **arguments).images


@pytest.fixture
def expected(folder) -> Tensor:
    return sample_images(load(folder))


# Offloading.


def test_images_are_the_same_under_the_hooks_of_model_cpu_offload(folder, expected):
    """On a CPU the hooks move nothing; that they move packed layers as well is shown in test_cuda.py."""
    pipe = load(folder)
    pipe.enable_model_cpu_offload(device="cpu")
    assert all(hasattr(part, "_hf_hook") for part in (pipe.unet, pipe.vae, pipe.text_encoder))
    assert torch.equal(sample_images(pipe), expected)
    pipe.remove_all_hooks()
    assert not hasattr(pipe.unet, "_hf_hook")
    assert torch.equal(sample_images(pipe), expected)


def test_sequential_cpu_offload_leaves_nothing_of_a_packed_layer_behind(folder, expected):
    pipe = load(folder)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        # What `enable_sequential_cpu_offload` does; that names the device "cpu:0", which accelerate takes for another.
        cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)
    for _ in range(2):
        assert all(parameter.is_meta for parameter in pipe.unet.parameters())
        assert torch.equal(sample_images(pipe), expected)


@pytest.mark.parametrize("what", ["model", "pipeline"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level", "disk"])
def test_group_offloading(folder, expected, tmp_path, kind, what):
    pipe = load(folder)
    where = {"onload_device": CPU, "offload_device": CPU, "offload_type": "leaf_level"}
    if kind == "block_level":
        where |= {"offload_type": kind, "num_blocks_per_group": 1}
    if kind == "disk":
        where["offload_to_disk_path"] = str(tmp_path)
    (pipe if what == "pipeline" else pipe.unet).enable_group_offload(**where)
    assert torch.equal(sample_images(pipe), expected)
    if kind == "disk":
        assert list(tmp_path.rglob("*.safetensors"))
        assert torch.equal(sample_images(pipe), expected)


def test_a_compiled_model_under_group_offloading(packed_folders, call_unet):
    unet = UNet2DConditionModel.from_pretrained(packed_folders["table"], subfolder="unet")
    expected = call_unet(unet)
    unet.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    unet.compile(backend="eager")  # traced; what a backend then makes of it is in test_compile.py
    assert torch.allclose(call_unet(unet), expected, atol=1e-5)


def test_a_lora_on_an_offloaded_model(packed_folders):
    pictures = []
    for offloaded in (False, True):
        pipe = load(packed_folders["keep"])
        lora = {f"unet.{name}": value for name, value in tiny_lora(pipe.unet, ("to_q", "to_v")).items()}
        pipe.load_lora_weights(lora)
        if offloaded:  # diffusers loads onto an offloaded pipeline only where there is an accelerator
            pipe.enable_model_cpu_offload(device="cpu")
        pictures.append(sample_images(pipe))
    assert torch.equal(*pictures)


# Device maps.


@pytest.mark.parametrize("device_map", ["balanced", "cpu"])
def test_a_pipeline_by_device_map(folder, expected, device_map):
    assert torch.equal(sample_images(load(folder, device_map=device_map)), expected)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_a_model_by_named_device_map(folder, expected, device_map):
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", device_map=device_map)
    assert unet.hf_device_map == {"": "cpu"}
    assert torch.equal(sample_images(load(folder, unet=unet)), expected)


def test_an_automatic_device_map_spills_a_packed_model_to_the_disk(folder, expected, tmp_path):
    limits = {"max_memory": {"cpu": "200KB"}, "offload_folder": tmp_path}
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", device_map="auto", **limits)
    assert "disk" in unet.hf_device_map.values()
    assert any(layer.codes.is_meta for layer in list(all_packed_layers(unet).values()))
    assert torch.equal(sample_images(load(folder, unet=unet)), expected)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_shards_load_by_device_map(folder, expected, tmp_path, device_map):
    load(folder).unet.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    unet = UNet2DConditionModel.from_pretrained(tmp_path, device_map=device_map, low_cpu_mem_usage=True)
    assert torch.equal(sample_images(load(folder, unet=unet)), expected)


def test_device_maps_count_packed_bytes(packed_folders):
    # What a model takes by accelerate's count is what the map plans with: were codes counted as floats, it would
    # send a model to the disk that fits four times.
    plain = UNet2DConditionModel.from_pretrained(packed_folders["keep"], subfolder="unet", dtype=torch.float16)
    size = plain.get_memory_footprint()
    room = {"max_memory": {"cpu": int(1.4 * size)}}
    unet = UNet2DConditionModel.from_pretrained(
        packed_folders["keep"], subfolder="unet", dtype=torch.float16, device_map="auto", **room
    )
    assert unet.hf_device_map == {"": "cpu"}


# Slicing.


def test_slicing_of_attention_and_vae_does_what_it_does_on_the_dequantized_model(packed_folders):
    pictures = []
    for dequantized in (False, True):
        pipe = load(packed_folders["keep"])
        if dequantized:
            pipe.unet.dequantize().requires_grad_(False)
        pipe.enable_attention_slicing("max")
        pipe.vae.enable_slicing()
        pipe.vae.enable_tiling()
        arguments = {"num_inference_steps": 2, "height": 16, "width": 16, "num_images_per_prompt": 2}
        pictures.append(pipe("ab", generator=torch.Generator().manual_seed(1), output_type="pt", **arguments).images)
    assert torch.equal(*pictures)


# accelerate.


def test_a_training_state_is_saved_and_loaded(folder, tmp_path):
    accelerator = Accelerator(cpu=True)
    unet = load(folder).unet
    unet.conv_in.bias.requires_grad_(True)
    optimizer = torch.optim.AdamW([unet.conv_in.bias], lr=1e-2)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    unet.conv_in.bias.grad = torch.ones_like(unet.conv_in.bias)
    optimizer.step()
    saved = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    accelerator.save_state(tmp_path)
    optimizer.step()
    with torch.no_grad():
        for tensor in unet.state_dict().values():
            tensor.zero_()
    accelerator.load_state(tmp_path)
    for name, tensor in unet.state_dict().items():
        assert tensor.dtype == saved[name].dtype and torch.equal(tensor, saved[name]), name
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_a_state_dict_loads_into_a_packed_model(folder, make_config, expected):
    pipe = load(folder)
    state = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    with torch.no_grad():
        for tensor in pipe.unet.state_dict().values():
            tensor.zero_()
    assert not torch.equal(sample_images(pipe), expected)
    pipe.unet.load_state_dict(state)
    assert torch.equal(sample_images(pipe), expected)
