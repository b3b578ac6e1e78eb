"""LoRAs fused into packed layers: what they compute, are saved as and come back as; what is not fused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from lora_cases import (
    TOLERANCE,
    close,
    every_dtype,
    every_kind,
    layers,
    make_lora,
    train_config,
    with_trainable_adapter,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_bitsfusion import set_compute, size_report
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.integrations.peft_lora import PackedLoraLinear
from diffusers_bitsfusion.nn import PackedWeight
from diffusers_bitsfusion.nn.conversion import pack_weight, packed_from_float

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(("bits", "least", "most"), [(1, 0, 0), (2, 0, 0), (3, 0, 0.01), (4, 0.05, 0.15), (6, 0.9, 1)])
def test_rounding_a_fused_weight_again_would_lose_most_of_the_adapter(bits, least, most):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(320, 320, bias=False)
    layer.weight.data = torch.randn(320, 320, generator=generator)
    packed = packed_from_float(layer, bits, torch.float32)
    pack_weight(packed, layer.weight, Rounding())
    delta = torch.randn(320, 8, generator=generator) @ torch.randn(8, 320, generator=generator)
    delta *= 0.05 / delta.std()
    scale, half = packed.scale.view(torch.float32), 2 ** (bits - 1)
    change = torch.round((packed.weight + delta) / scale).clamp(-half, half) * scale - packed.weight
    kept = float((change * delta).sum() / (delta * delta).sum())
    assert least <= round(kept, 4) <= most


def fuse_two(unet: nn.Module) -> None:
    for name, kind in (("a", "linear"), ("b", "conv"), ("c", "linear")):
        unet.load_lora_adapter(make_lora(unet, kind, seed=ord(name)), prefix=None, adapter_name=name)
    unet.set_adapters(["a", "b", "c"], [0.7, 0.6, -0.4])


@every_dtype
def test_a_fused_model_equals_the_unfused_one_and_unfusing_restores_it(unets, call_unet, dtype):
    unet, _ = unets(dtype)
    bare = call_unet(unet)
    fuse_two(unet)
    unfused = call_unet(unet)
    unet.fuse_lora()
    fused = call_unet(unet)
    close(fused, unfused, 1e-3 if dtype == torch.float32 else TOLERANCE[dtype])
    assert {p.dtype for n, p in unet.named_parameters() if ".branch_" in n} == {dtype}
    unet.unfuse_lora()
    assert torch.equal(call_unet(unet), unfused)
    assert not [name for name, _ in unet.named_parameters() if ".branch_" in name]
    unet.fuse_lora()
    unet.unload_lora()
    assert torch.equal(call_unet(unet), fused)
    assert not torch.equal(fused, bare)


@every_dtype
@every_kind
def test_fusing_one_adapter_of_scale_one_changes_no_bit(unets, call_unet, kind, dtype):
    unet, _ = unets(dtype)
    unet.load_lora_adapter(make_lora(unet, kind), prefix=None)
    unfused = call_unet(unet)
    unet.fuse_lora()
    assert torch.equal(call_unet(unet), unfused)


def test_fusing_applies_to_the_named_adapters_at_the_scale(unets, call_unet):
    (unet, _), (other, _) = unets(), unets()
    for model in (unet, other):
        fuse_two(model)
    other.set_adapters(["a", "b"], [0.5 * 0.7, 0.5 * 0.6])
    unet.fuse_lora(lora_scale=0.5, adapter_names=["a", "b"])
    close(call_unet(unet), call_unet(other), 1e-5)


@every_dtype
def test_a_fused_pipeline_comes_back_from_its_folder(packed_folders, call_unet, tmp_path, dtype):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["table"], dtype=dtype)
    lora = make_lora(pipe.unet, "linear") | make_lora(pipe.unet, "conv")
    pipe.load_lora_weights({f"unet.{key}": value for key, value in lora.items()})
    unfused = call_unet(pipe.unet)
    pipe.fuse_lora()
    fused = call_unet(pipe.unet)
    pipe.save_pretrained(tmp_path / "wrapped")
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "unloaded")
    ranks = {n: m.branch_rank for n, m in pipe.unet.named_modules() if isinstance(m, PackedWeight)}
    assert set(ranks.values()) == {0, 4}
    for folder in ("wrapped", "unloaded"):
        again = StableDiffusionPipeline.from_pretrained(tmp_path / folder, dtype=dtype)
        assert again.unet.state_dict().keys() == pipe.unet.state_dict().keys()
        assert torch.equal(call_unet(again.unet), fused)
        config = json.loads((tmp_path / folder / "unet" / "config.json").read_text())["quantization_config"]
        assert {name: layer.get("branch_rank", 0) for name, layer in config["layers"].items()} == ranks
    close(fused, unfused, 1e-3 if dtype == torch.float32 else TOLERANCE[dtype])


def test_saving_after_unfusing_has_no_branches(unet, tmp_path):
    fuse_two(unet)
    unet.fuse_lora()
    unet.save_pretrained(tmp_path)
    unet.unfuse_lora()
    unet.unload_lora()
    unet.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / WEIGHTS) if ".branch_" in name]
    assert "branch_rank" not in (tmp_path / "config.json").read_text()


def test_saving_says_which_adapters_it_leaves_out(unet, unets, call_unet, tmp_path, caplog):
    fuse_two(unet)
    unet.fuse_lora(adapter_names=["b"])
    with caplog.at_level("WARNING", logger="diffusers"):
        unet.save_pretrained(tmp_path)
    assert "without its adapters a, c" in caplog.text
    only_b, _ = unets()
    fuse_two(only_b)
    only_b.set_adapters(["b"], [0.6])
    close(call_unet(UNet2DConditionModel.from_pretrained(tmp_path)), call_unet(only_b), 1e-5)


def test_more_can_be_fused_onto_what_was_fused_and_saved(unet, call_unet, tmp_path):
    unet.load_lora_adapter(make_lora(unet, "linear"), prefix=None)
    unet.fuse_lora()
    unet.save_pretrained(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path)
    first = call_unet(unet)
    unet.load_lora_adapter(make_lora(unet, "linear", rank=2, seed=1), prefix=None)
    both = call_unet(unet)
    unet.fuse_lora()
    close(call_unet(unet), both, 1e-5)
    assert {layer.branch_rank for layer in layers(unet, PackedWeight)} == {0, 6}
    unet.unfuse_lora()
    unet.unload_lora()
    assert torch.equal(call_unet(unet), first)


def test_fusing_twice_and_unfusing_the_unfused_warn_and_change_nothing(unet, call_unet):
    unet.load_lora_adapter(make_lora(unet, "linear"), prefix=None)
    before = call_unet(unet)
    with pytest.warns(UserWarning, match="Already unmerged"):
        unet.unfuse_lora()
    assert torch.equal(call_unet(unet), before)
    unet.fuse_lora()
    fused = call_unet(unet)
    with pytest.warns(UserWarning, match="already merged"):
        unet.fuse_lora()
    assert torch.equal(call_unet(unet), fused)
    assert {layer.branch_rank for layer in layers(unet, PackedWeight)} == {0, 4}


def test_merging_by_peft_alone_works_too(unets, call_unet):
    unet, dequantized = unets()
    config = train_config(target_modules=["to_q", "conv1"], init_lora_weights=False)
    outputs = []
    for model in (unet, dequantized):
        torch.manual_seed(0)
        outputs.append(call_unet(get_peft_model(model, config).merge_and_unload(safe_merge=True)))
    close(*outputs, 1e-5)


def test_safe_fusing_refuses_what_is_not_finite(unet):
    lora = make_lora(unet, "linear")
    next(iter(lora.values()))[0, 0] = math.nan
    unet.load_lora_adapter(lora, prefix=None)
    with pytest.raises(ValueError, match="default_0 hold NaN or infinite"):
        unet.fuse_lora(safe_fusing=True)


def test_the_size_report_has_branches_and_loaded_adapters_apart(unet, tmp_path):
    part = "LoRA branches"
    bare = size_report(unet)
    assert bare.parts[part] == 0
    lora = make_lora(unet, "linear") | make_lora(unet, "conv")
    size = sum(value.nbytes for value in lora.values())
    unet.load_lora_adapter(lora, prefix=None)
    loaded = size_report(unet)
    unet.fuse_lora()
    unet.unload_lora()
    fused = size_report(unet)
    for report in (loaded, fused):
        assert report.parts == bare.parts | {part: size}
        assert report.average_bits == bare.average_bits
        assert report.fp16_bytes == bare.fp16_bytes
    unet.save_pretrained(tmp_path)
    assert size_report(tmp_path).parts[part] == size


@every_dtype
def test_dequantizing_folds_the_branch_into_the_weight(unets, call_unet, tmp_path, dtype):
    unet, _ = unets(dtype)
    fuse_two(unet)
    unet.fuse_lora()
    fused = call_unet(unet)
    weights = {name: module.weight for name, module in unet.named_modules() if isinstance(module, PackedWeight)}
    unet.dequantize()
    close(call_unet(unet), fused, TOLERANCE[dtype])
    for name, weight in weights.items():
        if "lora_" not in name:
            assert torch.equal(unet.get_submodule(name).weight, weight)
    unet.unload_lora()
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path, dtype=dtype)
    close(call_unet(again), fused, TOLERANCE[dtype])


def test_after_dequantizing_adapters_are_peft_s_own(unets, call_unet):
    unet, dequantized = unets()
    unet.load_lora_adapter(make_lora(unet, "linear"), prefix=None)
    unet.fuse_lora()
    unet.dequantize()
    unet.unfuse_lora()
    unet.unload_lora()
    close(call_unet(unet), call_unet(dequantized), 1e-5)


# What is not fused.


def test_rslora_is_fused_with_its_scale(unet, call_unet):
    with_trainable_adapter([unet], train_config(use_rslora=True, lora_alpha=3))
    unfused = call_unet(unet.eval())
    unet.fuse_lora()
    close(call_unet(unet), unfused, 1e-5)


def add_dora(model: nn.Module, name: str = "dora") -> None:
    torch.manual_seed(3)
    model.add_adapter(train_config(use_dora=True, init_lora_weights=False), adapter_name=name)
    for parameter_name, parameter in model.named_parameters():
        if "magnitude" in parameter_name:
            parameter.data *= 0.5 + torch.rand_like(parameter)


@every_dtype
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_a_dora_is_fused_beside_a_lora_onto_what_was_fused_before(unets, call_unet, tmp_path, dtype):
    unet, _ = unets(dtype)
    unet.load_lora_adapter(make_lora(unet, "linear", seed=1), prefix=None)
    unet.fuse_lora()
    unet.unload_lora()
    bare = call_unet(unet)
    unet.load_lora_adapter(make_lora(unet, "conv", seed=2), prefix=None, adapter_name="plain")
    add_dora(unet)
    unet.set_adapters(["plain", "dora"], [0.7, 0.6])
    unfused = call_unet(unet)
    unet.fuse_lora(adapter_names=["plain"])
    unet.fuse_lora(adapter_names=["dora"])
    fused = call_unet(unet)
    close(fused, unfused, 1e-5 if dtype == torch.float32 else TOLERANCE[dtype])
    unet.save_pretrained(tmp_path)
    assert torch.equal(call_unet(UNet2DConditionModel.from_pretrained(tmp_path, dtype=dtype)), fused)
    unet.unfuse_lora()
    unet.unload_lora()
    assert torch.equal(call_unet(unet), bare)


def test_integers_that_are_kept_follow_a_fused_dora(unets, call_unet):
    outputs = []
    for early in (True, False):
        unet, _ = unets()
        if early:
            set_compute(unet, "int8", resident="int8")
        add_dora(unet)
        unet.fuse_lora()
        if not early:
            set_compute(unet, "int8", resident="int8")
        outputs.append(call_unet(unet))
    assert torch.equal(*outputs)


def test_two_doras_are_fused_and_magnitudes_that_are_no_scales_are_refused(unet, call_unet):
    add_dora(unet)
    add_dora(unet, "other")
    unet.set_adapters(["dora", "other"])
    before = call_unet(unet)
    unet.fuse_lora()
    close(call_unet(unet), before, 1e-5)
    unet.unfuse_lora()
    assert torch.equal(call_unet(unet), before)
    magnitude = next(p for name, p in unet.named_parameters() if "magnitude" in name)
    for value in (-1.0, 0.0, float("inf"), float("nan")):
        magnitude.data[0] = value
        with pytest.raises(ValueError, match="magnitudes must be positive and finite"):
            unet.fuse_lora()
    assert not any(layer.branch_rank for layer in layers(unet, PackedWeight))


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_a_bias_of_layers_without_one_is_refused_before_anything_is_fused(unet, call_unet):
    unet.add_adapter(LoraConfig(r=4, target_modules=["conv1", "ff.net.2"]), adapter_name="plain")
    unet.add_adapter(train_config(lora_bias=True), adapter_name="other")
    unet.set_adapters(["plain", "other"])
    before = call_unet(unet)
    with pytest.raises(ValueError, match=r"has a bias .* and the layer has none"):
        unet.fuse_lora()
    assert not [layer for layer in layers(unet, PackedWeight) if layer.branch_rank]
    assert torch.equal(call_unet(unet), before)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_a_grouped_convolution_accepts_an_adapter_but_no_fusing():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, groups=2)
    packed = packed_from_float(conv, 4, torch.float32)
    pack_weight(packed, conv.weight, Rounding(iterations=2))
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(packed), config)
    x = torch.randn(1, 4, 6, 6)
    layer = model.base_model.model[0]
    lora = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    close(model(x), packed(x) + lora, 1e-6)
    with pytest.raises(ValueError, match="2 groups"):
        model.merge_adapter()


def test_offloaded_weights_are_not_fused(unet):
    unet.load_lora_adapter(make_lora(unet, "linear"), prefix=None)
    layer = layers(unet, PackedLoraLinear)[0]
    layer.base_layer.codes = nn.Parameter(layer.base_layer.codes.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match="fuse before offloading"):
        unet.fuse_lora()


# Checkpoints with branches.


@pytest.fixture
def fused_folder(unet, tmp_path) -> Path:
    unet.load_lora_adapter(make_lora(unet, "linear"), prefix=None)
    unet.fuse_lora()
    unet.save_pretrained(tmp_path)
    return tmp_path


def change_tensors(folder: Path, change) -> str:
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith(".branch_up"))
    change(tensors, name)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "lacks {}"),
        (lambda tensors, name: tensors.update({name: tensors[name][:, :3].contiguous()}), "{} must be floating"),
        (lambda tensors, name: tensors.update({name: tensors[name].int()}), "{} must be floating"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_a_damaged_branch_is_refused(fused_folder, change, message):
    name = change_tensors(fused_folder, change)
    with pytest.raises(ValueError, match=message.format(name)):
        UNet2DConditionModel.from_pretrained(fused_folder)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (None, "branch_rank 0"),
        (3, "branch_rank 3"),
        (0, "from 1"),
        (-1, "from 1"),
        ("4", "from 1"),
        (1 << 17, "from 1"),
        (10**20, "21 digits"),
    ],
)
def test_a_branch_must_be_as_the_config_says(fused_folder, rank, message):
    path = fused_folder / "config.json"
    config = json.loads(path.read_text())
    for layer in config["quantization_config"]["layers"].values():
        if "branch_rank" in layer:
            layer["branch_rank"] = rank
            if rank is None:
                del layer["branch_rank"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        UNet2DConditionModel.from_pretrained(fused_folder)
