"""Scales of 16 bits in the file: what is saved, loaded, trained and refused, against numpy and plain operations."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet1DModel, UNet2DConditionModel
from helpers import packed_layers
from kept_files import SMALL
from safetensors.torch import load_file, save_file
from tiny import tiny_unet
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_bitsfusion import BitsFusionConfig, convert, prepare_qat, quantize_model
from diffusers_bitsfusion.nn.fake_quantized import fake_quantized_from_float
from diffusers_bitsfusion.nn.packed_tensor import PackedTensor

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHORT = BitsFusionConfig(recipe=2, scale_dtype="bfloat16")


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round fp32 to the nearest of bfloat16, ties to even: int16, the upper halves of the bits."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16)


def test_the_file_has_the_upper_halves_of_the_scales_and_loads_to_the_same_model(tmp_path):
    full = quantize_model(tiny_unet(**SMALL), BitsFusionConfig(recipe=2), progress=False)
    unet = quantize_model(tiny_unet(**SMALL), SHORT, progress=False)
    unet.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for name, layer in packed_layers(full).items():
        expected = as_bfloat16(layer.scale.view(torch.float32).numpy().ravel())
        assert np.array_equal(tensors[f"{name}.scale"].numpy(), expected), name
        assert torch.equal(layer.codes, packed_layers(unet)[name].codes)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in unet.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format_version"] == 4


def test_parameters_of_other_modules_and_text_encoders_have_them_too(tmp_path):
    text = CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    sound = UNet1DModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("DownBlock1D",), up_block_types=("UpBlock1D",), mid_block_type="UNetMidBlock1D",
    )  # fmt: skip
    for model in (CLIPTextModel(text), sound):
        quantize_model(model, SHORT, progress=False).save_pretrained(tmp_path / type(model).__name__)
        again = type(model).from_pretrained(tmp_path / type(model).__name__)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        (file,) = (tmp_path / type(model).__name__).glob("*.safetensors")
        scales = [value for name, value in load_file(file).items() if name.endswith(".scale")]
        assert scales and all(scale.dtype == torch.int16 for scale in scales)
    assert any(isinstance(module, PackedTensor) for module in sound.modules())


def test_a_target_of_the_file_has_them_unless_others_are_asked_for():
    assert BitsFusionConfig().scale_dtype == BitsFusionConfig(target_bytes=9, budget="memory").scale_dtype == "float32"
    for config in (
        BitsFusionConfig(target_bytes=9),
        BitsFusionConfig(target_bytes=9, scale_dtype="float32"),
        BitsFusionConfig(target_bytes=9, budget="memory", scale_dtype="bfloat16"),
    ):
        assert BitsFusionConfig.from_dict(config.to_dict()).scale_dtype == config.scale_dtype
    assert BitsFusionConfig(target_bytes=9, scale_dtype="float32").scale_dtype == "float32"
    config = BitsFusionConfig()
    config.target_bytes = 9
    assert config.scale_dtype == "bfloat16"


def test_files_with_a_target_from_before_there_was_a_choice_are_read_as_they_are():
    layers = {"conv_in": {"bits": 2, "shape": [4, 4, 3, 3]}}
    config = BitsFusionConfig(target_bytes=9, time_embedding={"type": "keep"}, format_version=1, layers=layers)
    assert config.scale_dtype == config.schema.layers["conv_in"].scale_dtype == "float32"


@pytest.mark.parametrize("dtype", ["float16", "", 16, torch.bfloat16])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"scale_dtype must be one of \('float32', 'bfloat16'\), got"):
        BitsFusionConfig(scale_dtype=dtype)
    with pytest.raises(ValueError, match="scale_dtype of layer 'a' must be one of"):
        BitsFusionConfig(format_version=4, layers={"a": {"bits": 2, "shape": [4, 4], "scale_dtype": dtype}})


@pytest.mark.parametrize("bits", [0x0000, 0x7F80, 0x7FC0, -0x4080])
def test_scales_that_are_none_are_refused(tmp_path, bits):
    """0, infinity, NaN, -1."""
    quantize_model(tiny_unet(**SMALL), SHORT, progress=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["conv_in.scale"][0] = bits
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"conv_in\.scale holds scales that are not positive"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_scales_of_the_other_size_are_refused(tmp_path):
    quantize_model(tiny_unet(**SMALL), SHORT, progress=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["conv_in.scale"] = tensors["conv_in.scale"].to(torch.int32)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"conv_in\.scale must be torch\.int16 of shape"):
        UNet2DConditionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_layers_in_training_round_with_the_scales_of_the_file(kind):
    torch.manual_seed(0)
    plain = nn.Linear(24, 6) if kind == "linear" else nn.Conv2d(6, 6, 2)
    x = torch.randn(5, 24) if kind == "linear" else torch.randn(5, 6, 4, 4)
    layer = fake_quantized_from_float(plain, 2, scale_dtype="bfloat16")
    coarse = torch.from_numpy(as_bfloat16(layer.scale.detach().numpy())).view(torch.bfloat16).float()
    assert not torch.equal(coarse, layer.scale)
    rows = coarse.view(-1, *(1 for _ in plain.weight.shape[1:]))
    weight = (plain.weight / rows).round().clamp(-2, 2) * rows
    output = layer(x)
    expected = F.linear(x, weight, plain.bias) if kind == "linear" else F.conv2d(x, weight, plain.bias)
    torch.testing.assert_close(output, expected)
    # The scale's gradient is that of a layer whose scale is the rounded one, itself in bfloat16.
    other = fake_quantized_from_float(plain, 2)
    other.scale.data.copy_(coarse)
    for one in (output, other(x)):
        one.square().sum().backward()
    torch.testing.assert_close(layer.scale.grad, other.scale.grad, rtol=2**-7, atol=0)
    torch.testing.assert_close(layer.weight.grad, other.weight.grad)


def test_converting_changes_no_output(tmp_path):
    unet = prepare_qat(tiny_unet(**SMALL), BitsFusionConfig(recipe=2, scale_dtype="bfloat16", time_embedding="keep"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if name.endswith(".scale"):
            parameter.data.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
    inputs = torch.randn(1, 4, 8, 8, generator=generator), 5, torch.randn(1, 3, 4, generator=generator)
    with torch.no_grad():
        expected = unet(*inputs).sample
        packed = convert(copy.deepcopy(unet))
        torch.testing.assert_close(packed(*inputs).sample, expected)
        packed.save_pretrained(tmp_path)
        assert torch.equal(UNet2DConditionModel.from_pretrained(tmp_path)(*inputs).sample, packed(*inputs).sample)
