"""Models that are spread, offloaded or loaded by threads: what is refused meanwhile, and what is not."""

import threading

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from diffusers import UNet2DConditionModel
from diffusers.models import modeling_utils
from tiny import tiny_unet

from diffusers_bitsfusion import quantize_model
from diffusers_bitsfusion.packing.packer import ModelPacker

pytestmark = pytest.mark.usefixtures("one_thread")


def test_quantizing_onto_the_disk_is_refused_with_the_way_out(source_folder, make_config, tmp_path):
    arguments = {"subfolder": "unet", "quantization_config": make_config(), "offload_folder": tmp_path}
    children = dict.fromkeys((name for name, _ in tiny_unet().named_children()), "cpu")
    with pytest.raises(ValueError, match=r'device map with "disk".*Quantize and save the model first'):
        UNet2DConditionModel.from_pretrained(source_folder, device_map=children | {"mid_block": "disk"}, **arguments)
    with pytest.raises(ValueError, match='device map with "disk"'):
        UNet2DConditionModel.from_pretrained(source_folder, device_map={"": "disk"}, **arguments)


def test_an_automatic_device_map_that_spills_to_disk_is_refused(source_folder, make_config, tmp_path):
    with pytest.raises(ValueError, match='device map with "disk"'):
        UNet2DConditionModel.from_pretrained(
            source_folder,
            subfolder="unet",
            quantization_config=make_config(),
            device_map="auto",
            max_memory={"cpu": "20KB"},
            offload_folder=tmp_path,
        )


def test_swapping_layers_under_offloading_hooks_is_refused(make_config):
    plain = accelerate.cpu_offload(tiny_unet(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="Cannot quantize this UNet2DConditionModel: accelerate offloads it"):
        quantize_model(plain, make_config())
    packed = quantize_model(tiny_unet(), make_config(), progress=False)
    accelerate.cpu_offload(packed, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="Cannot dequantize this UNet2DConditionModel: accelerate offloads it"):
        packed.dequantize()
    remove_hook_from_submodules(packed)
    assert not packed.dequantize().is_quantized


def test_swapping_layers_under_diffusers_own_hooks_is_refused(make_config):
    cpu = torch.device("cpu")
    plain, packed = tiny_unet(), quantize_model(tiny_unet(), make_config(), progress=False)
    for unet in (plain, packed):
        unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    with pytest.raises(ValueError, match=r"Cannot quantize .*: diffusers has hooks on it \(group_offloading\)"):
        quantize_model(plain, make_config())
    with pytest.raises(ValueError, match=r"Cannot dequantize .*: diffusers has hooks on it \(group_offloading\)"):
        packed.dequantize()
    plain = tiny_unet()
    plain.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"diffusers has hooks on it \(layerwise_casting\)"):
        quantize_model(plain, make_config())


def test_a_model_that_lies_on_the_disk_is_not_saved_from_memory(make_config, tmp_path, call_unet):
    cpu = torch.device("cpu")
    packed = quantize_model(tiny_unet(), make_config(), progress=False)
    where = {"onload_device": cpu, "offload_device": cpu, "offload_type": "leaf_level"}
    packed.enable_group_offload(**where, offload_to_disk_path=str(tmp_path / "groups"))
    with pytest.raises(ValueError, match="group offloading has moved its weights to the disk"):
        packed.save_pretrained(tmp_path / "out")
    packed = quantize_model(tiny_unet(), make_config(), progress=False)
    expected = call_unet(packed)
    packed.enable_group_offload(**where)
    packed.save_pretrained(tmp_path / "out")
    assert torch.equal(call_unet(UNet2DConditionModel.from_pretrained(tmp_path / "out")), expected)


def test_threads_that_load_shards_do_not_quantize(make_config, tmp_path, monkeypatch):
    tiny_unet().save_pretrained(tmp_path, max_shard_size="60KB")
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    take, threads = ModelPacker.take, set()
    monkeypatch.setattr(ModelPacker, "take", lambda *args: threads.add(threading.current_thread()) or take(*args))
    unet = UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=make_config())
    assert threads == {threading.current_thread()}
    expected = quantize_model(tiny_unet(), make_config(), progress=False)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in unet.state_dict().items())
