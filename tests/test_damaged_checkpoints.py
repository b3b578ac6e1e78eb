"""Damaged checkpoints: every error names the tensor or key that is wrong, and where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny import tiny_unet
from torch import Tensor

from diffusers_bitsfusion import quantize_model

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "down_blocks.0.resnets.0.conv1"


# Weights.


def load_damaged(source: Path, folder: Path, damage: Callable[[dict[str, Tensor]], object], **arguments):
    """Load a copy of a saved UNet after `damage` has changed its tensors."""
    shutil.copytree(source / "unet", folder / "unet")
    file = folder / "unet" / WEIGHTS
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, {"format": "pt"})
    return UNet2DConditionModel.from_pretrained(folder / "unet", **arguments)


def test_an_unchanged_copy_loads(packed_folders, tmp_path):
    unet = load_damaged(packed_folders["keep"], tmp_path, lambda tensors: None)
    assert unet.is_quantized


@pytest.mark.parametrize(
    ("kind", "name"), [("keep", f"{LAYER}.codes"), ("keep", "conv_in.codes"), ("table", "time_proj.codes")]
)
@pytest.mark.parametrize("keep", [0.7, 0.0])
def test_a_truncated_tensor_is_named(packed_folders, tmp_path, kind, name, keep):
    def truncate(tensors):
        tensors[name] = tensors[name][: int(keep * tensors[name].numel())].clone()

    with pytest.raises(ValueError, match=rf"^{name} .*(damaged|cut short|bytes)"):
        load_damaged(packed_folders[kind], tmp_path, truncate)


@pytest.mark.parametrize("where", [0, 5, 0.5, -1])
@pytest.mark.parametrize(("kind", "name"), [("keep", f"{LAYER}.codes"), ("table", "time_proj.codes")])
def test_a_damaged_tensor_is_named(packed_folders, tmp_path, kind, name, where):
    def damage(tensors):
        position = where if isinstance(where, int) else int(where * tensors[name].numel())
        tensors[name][position] ^= 255

    with pytest.raises(ValueError, match=rf"^{name} "):
        load_damaged(packed_folders[kind], tmp_path, damage)


def test_impossible_bytes_without_compression_are_named(make_config, tmp_path):
    unet = quantize_model(tiny_unet(), make_config(recipe=1, compression=None), progress=False)
    unet.save_pretrained(tmp_path / "source" / "unet")

    def damage(tensors):
        tensors[f"{LAYER}.codes"][4, 2] = 243  # five ternary digits end at 242

    with pytest.raises(ValueError, match=rf"{LAYER}\.codes is damaged.*1-bit"):
        load_damaged(tmp_path / "source", tmp_path, damage)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("keep", f"{LAYER}.codes"),
        ("keep", f"{LAYER}.scale"),
        ("keep", f"{LAYER}.bias"),
        ("keep", "conv_norm_out.weight"),
        ("table", "time_proj.codes"),
        ("table", "time_proj.scale"),
        ("cache", "time_proj.values"),
        ("cache", "time_proj.timesteps"),
    ],
)
def test_a_missing_tensor_is_named(packed_folders, tmp_path, kind, name):
    with pytest.raises(ValueError, match=rf"UNet2DConditionModel lacks {name}"):
        load_damaged(packed_folders[kind], tmp_path, lambda tensors: tensors.pop(name))


def test_a_missing_tensor_is_named_with_a_disk_device_map(packed_folders, tmp_path):
    with pytest.raises(ValueError, match=rf"lacks {LAYER}\.scale"):
        load_damaged(
            packed_folders["keep"],
            tmp_path,
            lambda tensors: tensors.pop(f"{LAYER}.scale"),
            device_map={"": "disk"},
            offload_folder=tmp_path / "offload",
        )


WRONG = [
    ("keep", f"{LAYER}.scale", lambda t: t[:-1], rf"{LAYER}\.scale must be torch.int32 of shape \(32,\)"),
    ("keep", f"{LAYER}.scale", lambda t: t.float(), rf"{LAYER}\.scale must be torch.int32 .* has torch.float32"),
    ("keep", f"{LAYER}.codes", lambda t: t.view(1, -1), rf"{LAYER}\.codes must be one zstd frame"),
    ("keep", f"{LAYER}.codes", lambda t: t.int(), rf"{LAYER}\.codes must be one zstd frame.*int32"),
    ("keep", f"{LAYER}.bias", lambda t: t[:-1], rf"{LAYER}\.bias"),
    ("table", "time_proj.scale", lambda t: t[:-1], r"time_proj\.scale must be torch.int32"),
    ("table", "time_proj.codes", lambda t: t.view(1, -1), r"time_proj\.codes must be one zstd frame"),
    ("cache", "time_proj.values", lambda t: t[:-1], r"time_proj\.values must be torch.int16 of shape \(50, "),
    ("cache", "time_proj.values", lambda t: t.view(torch.float16), r"time_proj\.values must be torch.int16"),
    ("cache", "time_proj.timesteps", lambda t: t[:-1], r"time_proj\.timesteps must be torch.int32 of shape \(50,\)"),
]


@pytest.mark.parametrize(("kind", "name", "change", "message"), WRONG)
def test_a_tensor_of_wrong_shape_or_dtype_is_named(packed_folders, tmp_path, kind, name, change, message):
    def damage(tensors):
        tensors[name] = change(tensors[name]).clone()

    with pytest.raises(ValueError, match=message):
        load_damaged(packed_folders[kind], tmp_path, damage)


def test_the_codes_of_another_layer_are_refused_by_name(packed_folders, tmp_path):
    def swap(tensors):
        tensors[f"{LAYER}.codes"] = tensors["conv_in.codes"].clone()

    with pytest.raises(ValueError, match=rf"^{LAYER}\.codes holds \d+ bytes where \d+ are expected"):
        load_damaged(packed_folders["keep"], tmp_path, swap)


def test_a_damaged_shard_is_refused_by_tensor_name(packed_unet, tmp_path):
    packed_unet.save_pretrained(tmp_path, max_shard_size="60KB")
    where = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    shard = tmp_path / where[f"{LAYER}.codes"]
    tensors = load_file(shard)
    tensors[f"{LAYER}.codes"][20] ^= 255
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"^{LAYER}\.codes "):
        UNet2DConditionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("weight_map", None), ("weight_map", []), ("metadata", None), ("metadata", "x")]
)
def test_an_index_that_is_damaged_is_named(packed_unet, tmp_path, key, value):
    packed_unet.save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / f"{WEIGHTS}.index.json"
    content = json.loads(index.read_text())
    assert content.pop(key)
    index.write_text(json.dumps(content if value is None else content | {key: value}))
    with pytest.raises(ValueError, match=rf'{index.name} has no "{key}"'):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_a_quantization_config_that_is_no_object_is_named(packed_unet, tmp_path):
    packed_unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = [config["quantization_config"]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json is damaged: quantization_config must be an object"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_a_missing_shard_is_named(packed_unet, tmp_path):
    packed_unet.save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises((OSError, ValueError), match=shard.name):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_a_file_cut_short_is_named(packed_unet, tmp_path):
    packed_unet.save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(OSError, match=WEIGHTS):
        UNet2DConditionModel.from_pretrained(tmp_path)


# A damaged or foreign config.json.


def load_with_config(packed_unet, folder: Path, change: Callable[[dict], object]):
    packed_unet.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))
    return UNet2DConditionModel.from_pretrained(folder)


def test_a_newer_format_version_says_how_to_read_it(packed_unet, tmp_path):
    with pytest.raises(ValueError, match=r"format version 99, newer than .*pip install -U diffusers_bitsfusion"):
        load_with_config(packed_unet, tmp_path, lambda config: config.update(format_version=99))


def test_an_unknown_key_in_a_checkpoint_does_no_harm(packed_unet, tmp_path):
    loaded = load_with_config(packed_unet, tmp_path, lambda config: config.update(colour="red"))
    assert "colour" not in loaded.config.quantization_config.to_dict()


def test_a_config_without_layers_is_refused(packed_unet, tmp_path):
    with pytest.raises(ValueError, match="lists no layers"):
        load_with_config(packed_unet, tmp_path, lambda config: config.update(layers={}))


def test_a_layer_of_the_config_that_the_model_lacks_is_named(packed_unet, tmp_path):
    layer = {"bits": 2, "shape": [4, 4]}
    with pytest.raises(ValueError, match=r"packs mid_block\.gone, which UNet2DConditionModel does not have"):
        load_with_config(packed_unet, tmp_path, lambda config: config["layers"].update({"mid_block.gone": layer}))


def test_a_layer_of_the_config_with_another_shape_is_named(packed_unet, tmp_path):
    with pytest.raises(ValueError, match=rf"gives {LAYER} the shape \[64, 32, 3, 3\]"):
        load_with_config(packed_unet, tmp_path, lambda config: config["layers"][LAYER].update(shape=[64, 32, 3, 3]))


@pytest.mark.parametrize("bits", [0, 17, "two"])
def test_impossible_bits_in_the_config_are_named(packed_unet, tmp_path, bits):
    with pytest.raises(ValueError, match=rf"{LAYER}.*integer from 1 to 8, got {bits!r}"):
        load_with_config(packed_unet, tmp_path, lambda config: config["layers"][LAYER].update(bits=bits))


def test_other_bits_than_the_file_holds_are_refused_by_layer(packed_unet, tmp_path):
    bits = packed_unet.get_submodule(LAYER).bits
    with pytest.raises(ValueError, match=rf"{LAYER}\.codes"):
        load_with_config(
            packed_unet, tmp_path, lambda config: config["layers"][LAYER].update(bits=1 if bits > 1 else 2)
        )
