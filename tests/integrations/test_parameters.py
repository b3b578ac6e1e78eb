"""What asks a packed model about its parameters, or changes all of them, as users' scripts do."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from tiny import SDXL, tiny_controlnet, tiny_unet
from tiny_transformers import tiny_flux, tiny_pixart, tiny_sana, tiny_sd3
from torch import nn

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.nn import PackedWeight

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {
    "UNet": tiny_unet,
    "SDXL": lambda: tiny_unet(**SDXL),
    "ControlNet": tiny_controlnet,
    "Flux": tiny_flux,
    "PixArt": tiny_pixart,
    "Sana": tiny_sana,
    "SD3": tiny_sd3,
}
every_family = pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES)


def quantized(model, **changes):
    return quantize_model(model, BitsFusionConfig(**({"recipe": 4} | changes)), progress=False)


@every_family
def test_a_packed_model_has_the_parameters_of_the_float_one(build):
    model = build()
    expected = [model.num_parameters(), model.num_parameters(exclude_embeddings=True)]
    packed = quantized(model)
    assert [packed.num_parameters(), packed.num_parameters(exclude_embeddings=True)] == expected
    trained = sum(p.numel() for p in packed.parameters() if p.requires_grad)
    assert packed.num_parameters(only_trainable=True) == trained
    tensors = [*packed.parameters(), *packed.buffers()]
    assert packed.get_memory_footprint() == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("kind", ["table", "cache", "keep"])
def test_time_features_count_as_what_they_replace(kind):
    model = tiny_unet()
    expected = model.num_parameters()
    packed = quantized(model, time_embedding=kind)
    assert packed.num_parameters() == expected
    for layer in packed.modules():
        if isinstance(layer, PackedWeight) and isinstance(layer, nn.Linear):
            layer.extend_branch(torch.ones(2, layer.in_features), torch.ones(layer.out_features, 2))
    assert packed.num_parameters() == expected


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whoever_asks_for_a_dtype_gets_a_floating_one(build, dtype):
    packed = quantized(build().to(dtype))
    assert packed.dtype == dtype == packed.config["_pre_quantization_dtype"]
    assert next(packed.parameters()).is_floating_point()
    for name, layer in packed.named_modules():
        if isinstance(layer, PackedWeight) and layer.bias is not None:
            assert next(layer.parameters()).dtype == dtype, name


def test_a_model_of_packed_layers_alone_has_the_dtype_of_their_weights():
    packed = quantized(tiny_flux().to(torch.bfloat16))
    for name, parameter in list(packed.named_parameters()):
        if parameter.is_floating_point():
            owner, _, kind = name.rpartition(".")
            packed.get_submodule(owner).register_parameter(kind, None)
    assert packed.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["table", "cache", "keep"])
def test_casting_whatever_has_one_dimension_is_harmless(call_unet, kind):
    packed = quantized(tiny_unet(), time_embedding=kind)
    before, copied = call_unet(packed), copy.deepcopy(packed)
    for parameter in copied.parameters():
        if parameter.ndim == 1:
            assert parameter.is_floating_point()
            parameter.data = parameter.data.float()
    assert torch.equal(call_unet(copied), before)
    copied = copy.deepcopy(packed)
    for parameter in copied.parameters():
        if parameter.ndim <= 1:
            parameter.data = parameter.data.half().float()
    assert call_unet(copied).isfinite().all()


@pytest.mark.parametrize("kind", ["table", "cache", "keep"])
def test_files_keep_their_shapes(call_unet, tmp_path, kind):
    packed = quantized(tiny_unet(), time_embedding=kind)
    packed.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    bits = [name for name, t in tensors.items() if name.endswith((".scale", "time_proj.timesteps"))]
    assert bits and all(tensors[name].dim() == 1 and tensors[name].dtype == torch.int32 for name in bits)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    for name in bits:
        assert torch.equal(again.get_parameter(name)[:, 0], tensors[name])
    assert torch.equal(call_unet(again), call_unet(packed))
