"""`set_compute` and `compute=` on whole models: what changes, what stays, and what the size report says."""

from __future__ import annotations

import copy
import pickle
import platform

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers import all_packed_layers, attentions, relative_error
from peft import LoraConfig
from tiny import tiny_unet
from torch import nn

from diffusers_bitsfusion import BitsFusionConfig, quantize_model, set_compute, size_report
from diffusers_bitsfusion.nn import attention as nn_attention
from diffusers_bitsfusion.ops.dispatch import multiplies_blocks

pytestmark = pytest.mark.usefixtures("one_thread")

residents = pytest.mark.parametrize("resident", ["packed", "int8"])


def stays_exact(name, layer):
    """Whether a layer's input is not normalised, or its codes would overflow on a processor without VNNI."""
    return name.endswith(("conv_in", "conv_shortcut")) or (layer.bits == 8 and not torch.cpu._is_vnni_supported())


def in_integers(model):
    """The layers that should compute in integers."""
    return {name: layer for name, layer in all_packed_layers(model).items() if not stays_exact(name, layer)}


@residents
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integers_are_near_the_exact_model_and_exact_comes_back(packed_unet, call_unet, resident, dtype):
    unet = packed_unet if dtype == torch.float32 else quantize_model(tiny_unet().to(dtype), BitsFusionConfig(recipe=2))
    exact = call_unet(unet)
    set_compute(unet, "int8", resident)
    rounded = call_unet(unet)
    assert rounded.dtype == dtype
    # Random weights pass on every rounding; a trained model's error is a fraction of this.
    assert 0 < relative_error(rounded, exact) < 0.06
    set_compute(unet, "exact")
    assert torch.equal(call_unet(unet), exact)
    assert all(layer.int8_weight is None for layer in all_packed_layers(unet).values())


def test_both_residents_give_the_same_bits(packed_unet, call_unet):
    set_compute(packed_unet, "int8", "packed")
    expected = call_unet(packed_unet)
    set_compute(packed_unet, "int8", "int8")
    assert torch.equal(call_unet(packed_unet), expected)


def test_kept_codes_are_never_decoded_while_sampling(packed_unet, call_unet, decodes):
    set_compute(packed_unet, "int8", "int8")
    decodes.update(read=0, call=0)
    call_unet(packed_unet)
    exact = len(all_packed_layers(packed_unet)) - len(in_integers(packed_unet))
    assert exact > 1 and decodes == {"read": 0, "call": exact}


@residents
def test_the_config_chooses_while_quantizing_and_while_loading(make_config, source_folder, call_unet, resident):
    config = make_config(compute="int8", resident=resident)
    quantized = quantize_model(tiny_unet(), config, progress=False)
    assert {name for name, layer in all_packed_layers(quantized).items() if layer.computes_int8} == {
        *in_integers(quantized)
    }
    loaded = UNet2DConditionModel.from_pretrained(source_folder / "unet", quantization_config=config)
    assert torch.equal(call_unet(loaded), call_unet(quantized))
    set_compute(loaded, "exact")
    assert not torch.equal(call_unet(loaded), call_unet(quantized))


@residents
def test_saving_writes_the_packed_form_and_loading_is_exact_again(packed_unet, call_unet, resident, tmp_path):
    exact = call_unet(packed_unet)
    packed_unet.save_pretrained(tmp_path / "before")
    set_compute(packed_unet, "int8", resident)
    packed_unet.save_pretrained(tmp_path / "after")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "after")
    assert loaded.config.quantization_config.compute == "auto"
    assert torch.equal(call_unet(loaded), exact)
    set_compute(loaded, "int8", resident)
    assert torch.equal(call_unet(loaded), call_unet(packed_unet))


def test_copies_keep_how_they_compute(packed_unet, call_unet):
    set_compute(packed_unet, "int8", "int8")
    expected = call_unet(packed_unet)
    for copied in (copy.deepcopy(packed_unet), pickle.loads(pickle.dumps(packed_unet.conv_out))):
        assert all(layer.int8_weight is not None for layer in in_integers(nn.ModuleList([copied])).values())
    assert torch.equal(call_unet(copy.deepcopy(packed_unet)), expected)


def test_layers_under_an_adapter_keep_how_they_compute(packed_unet):
    expected = in_integers(packed_unet).keys()
    packed_unet.add_adapter(LoraConfig(r=2, target_modules=["conv_in", "conv_shortcut", "to_q"]))
    set_compute(packed_unet, "int8")
    found = {name for name, layer in all_packed_layers(packed_unet).items() if layer.computes_int8}
    assert {name.removesuffix(".base_layer") for name in found} == expected


def test_kept_codes_follow_a_state_dict(make_config, call_unet):
    first, second = (quantize_model(tiny_unet(seed), make_config(recipe=3), progress=False) for seed in (0, 1))
    set_compute(first, "int8", "int8")
    set_compute(second, "int8", "int8")
    assert not torch.equal(call_unet(first), call_unet(second))
    first.load_state_dict(second.state_dict())
    assert torch.equal(call_unet(first), call_unet(second))


def test_dequantizing_gives_an_ordinary_exact_model(packed_unet, call_unet):
    exact = call_unet(packed_unet)
    set_compute(packed_unet, "int8", "int8")
    plain = packed_unet.dequantize()
    torch.testing.assert_close(call_unet(plain), exact)
    assert not any("int8" in name for module in plain.modules() for name in vars(module))


@residents
def test_adapters_stay_exact_beside_integers_and_learn_the_exact_gradients(packed_unet, resident):
    """The adapters' own products are not rounded; gradients pass through the exact weights."""
    packed_unet.requires_grad_(False)
    packed_unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    layer = packed_unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(3, 32)
    results = {}
    for compute, kept in (("exact", "packed"), ("int8", resident)):
        set_compute(packed_unet, compute, kept)
        y = x.clone().requires_grad_()
        packed_unet.zero_grad()
        (layer(y) - layer.base_layer(y)).sum().backward()  # the base layer's own part cancels
        adapter = layer.lora_A["default"].weight.grad.clone(), layer.lora_B["default"].weight.grad.clone()
        z = x.clone().requires_grad_()
        layer.base_layer(z).square().sum().backward(inputs=[z])
        results[compute] = (*adapter, z.grad)
    for found, expected in zip(results["int8"][:2], results["exact"][:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert relative_error(results["int8"][2], results["exact"][2]) < 0.02


@residents
def test_an_adapter_learns_in_a_model_that_computes_in_integers(packed_unet, resident):
    packed_unet.requires_grad_(False)
    set_compute(packed_unet, "int8", resident)
    packed_unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"]))
    parameters = [p for p in packed_unet.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    generator = torch.Generator().manual_seed(0)
    sample, target = torch.randn(2, 2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 5, 32, generator=generator)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (packed_unet(sample, 501, states).sample - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_fusing_an_adapter_keeps_how_layers_compute(packed_unet, call_unet):
    set_compute(packed_unet, "int8", "int8")
    packed_unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    beside = call_unet(packed_unet)
    packed_unet.fuse_lora()
    torch.testing.assert_close(call_unet(packed_unet), beside, rtol=1e-4, atol=1e-4)
    assert all(layer.computes_int8 for layer in in_integers(packed_unet).values())


# The size report.


def kept_bytes(layer):
    """A byte a weight, as oneDNN's tensors are counted; in blocks also what fills them, and a sum an output."""
    outputs, inputs, *kernel = layer.weight_shape
    taps = torch.Size(kernel).numel()
    if not multiplies_blocks(torch.device("cpu"), layer.bits):
        return outputs * inputs * taps
    return -(-outputs // 16) * 16 * (taps * -(-inputs // 4) * 4 + 4)


def test_the_report_says_how_each_layer_computes_and_why(packed_unet):
    layers = all_packed_layers(packed_unet)
    report = size_report(packed_unet)
    assert report.kernels.keys() == layers.keys()
    assert {kernel.arithmetic for kernel in report.kernels.values()} == {"exact"}
    assert 'compute="auto" uses exact' in str(report)
    set_compute(packed_unet, "int8", "int8")
    kept, rounded = size_report(packed_unet), in_integers(packed_unet)
    assert kept.total_bytes == report.total_bytes + sum(map(kept_bytes, rounded.values()))
    assert f"{len(rounded):>6}  int8, weights int8 codes kept in memory" in str(kept)
    assert kept.to_dict()["kernels"]["conv_out"]["arithmetic"] == ("int8" if "conv_out" in rounded else "exact")
    assert kept.to_dict()["kernels"]["conv_in"]["arithmetic"] == "exact"
    assert "not normalised" in kept.kernels["conv_in"].reason


@pytest.mark.parametrize("reason", [None, "it may not"])
def test_the_report_says_how_attention_computes_and_why(packed_unet, monkeypatch, reason):
    monkeypatch.setattr(nn_attention, "why_no_bf16_attention", lambda device: reason)
    exact = set(size_report(packed_unet).attention_kernels.values())
    loop = "by bf16 dot products in compiled C"
    sometimes = f"{loop} where its inputs are bf16, else by torch: exact calls round no more than that"
    assert exact == {"by torch: it may not" if reason else sometimes}
    set_compute(packed_unet, "int8")
    report = size_report(packed_unet)
    how = "by torch: it may not" if reason else loop
    assert report.to_dict()["attention_kernels"] == dict.fromkeys(report.attention_kernels, how)
    assert f"{len(attentions(packed_unet)):>6}  attention {how}" in str(report)


def test_the_report_tells_layers_that_stay_exact_and_why(packed_unet, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    set_compute(packed_unet, "int8")
    kernels = size_report(packed_unet).kernels
    for name, layer in in_integers(packed_unet).items():
        assert layer.computes_int8 == (layer.bits < 8) == (kernels[name].arithmetic == "int8")
        assert ("VNNI" in kernels[name].reason) == (layer.bits == 8)


def test_a_file_has_no_kernels(packed_folders):
    assert size_report(packed_folders["keep"] / "unet").kernels == {}


# Bad input.


def test_a_machine_without_integers_refuses_and_nothing_changes(packed_unet, call_unet, monkeypatch):
    exact = call_unet(packed_unet)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ValueError, match=r'compute="int8" is not possible here: .*aarch64'):
        set_compute(packed_unet, "int8")
    assert torch.equal(call_unet(packed_unet), exact)
    with pytest.raises(ValueError, match='compute="int8" is not possible here'):
        quantize_model(tiny_unet(), BitsFusionConfig(recipe=2, compute="int8"), progress=False)


def test_a_model_that_is_not_quantized_is_refused():
    with pytest.raises(ValueError, match="no layers quantized"):
        set_compute(nn.Linear(2, 2), "exact")


@pytest.mark.parametrize("settings", [("int4", "packed"), ("int8", "gpu"), ("exact", "int8")])
def test_impossible_settings_are_refused(packed_unet, settings):
    with pytest.raises(ValueError, match=r"compute|resident"):
        set_compute(packed_unet, *settings)


def test_a_pipeline_samples_in_integers(packed_folders):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["table"])
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    exact = pipe("ab", generator=torch.Generator().manual_seed(0), **arguments).images
    set_compute(pipe.unet, "int8", "int8")
    rounded = pipe("ab", generator=torch.Generator().manual_seed(0), **arguments).images
    assert 0 < relative_error(rounded, exact) < 0.1
