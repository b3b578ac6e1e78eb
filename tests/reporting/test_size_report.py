"""Bits and bytes of `size_report`, against figures computed here from the files and the original model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers import layer_sizes
from safetensors.torch import load_file, save_file
from tiny import tiny_unet

from diffusers_bitsfusion import quantize_model, size_report

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("keep", "table", "cache")
WEIGHTS = "diffusion_pytorch_model.safetensors"
PACKED, SCALES, TIME = "packed weights", "scales", "time features"
OTHERS, OVERHEAD = "biases, norms, other tensors", "headers and config.json"


def file_bytes(folder: Path, *endings: str) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.name.endswith(endings or ("",)))


def is_time(name: str) -> bool:
    return name.startswith("time_embedding.") or name.endswith(".time_emb_proj")


def log2_levels(bits: int) -> float:
    return 8.0 if bits == 8 else math.log2(2**bits + 1)


def saved_layers(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]


@pytest.fixture(params=KINDS)
def packed(request, packed_folders) -> tuple[str, Path]:
    """(what became of the time embedding, folder of the UNet)."""
    return request.param, packed_folders[request.param] / "unet"


# Bytes.


def test_bytes_of_a_folder_add_up_to_its_files(packed):
    _, folder = packed
    assert size_report(folder).total_bytes == file_bytes(folder, ".safetensors", ".json")


def test_each_part_has_the_bytes_of_its_tensors(packed):
    kind, folder = packed
    parts = dict.fromkeys((PACKED, SCALES, TIME, OTHERS), 0)
    layers = saved_layers(folder)
    for name, tensor in load_file(folder / WEIGHTS).items():
        owner, _, leaf = name.rpartition(".")
        if name.startswith("time_proj."):
            part = TIME
        else:
            part = {"codes": PACKED, "scale": SCALES}.get(leaf, OTHERS) if owner in layers else OTHERS
        parts[part] += tensor.nbytes
    report = size_report(folder)
    assert {name: report.parts[name] for name in parts} == parts
    assert (parts[TIME] > 0) == (kind != "keep")
    assert report.parts[OVERHEAD] == file_bytes(folder, ".safetensors", ".json") - sum(parts.values())


def test_bytes_of_shards_add_up_too(packed_unet, tmp_path):
    packed_unet.save_pretrained(tmp_path, max_shard_size="60KB")
    report = size_report(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert report.total_bytes == file_bytes(tmp_path, ".safetensors", ".json")
    packed_unet.save_pretrained(tmp_path / "one")
    assert report.parts[PACKED] == size_report(tmp_path / "one").parts[PACKED]


def test_a_folder_may_be_named_by_a_string(packed):
    _, folder = packed
    assert size_report(str(folder)).to_dict() == size_report(folder).to_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_model_in_memory_add_up_to_its_tensors(packed_folders, kind):
    unet = UNet2DConditionModel.from_pretrained(packed_folders[kind], subfolder="unet")
    report = size_report(unet)
    assert report.where == "memory"
    assert report.total_bytes == unet.get_memory_footprint()
    codes = sum(p.nbytes for n, p in unet.named_parameters() if n.endswith(".codes") and not n.startswith("time_proj"))
    assert report.parts[PACKED] == codes


def test_half_precision_halves_what_is_not_packed(packed_folders):
    reports = [
        size_report(UNet2DConditionModel.from_pretrained(packed_folders["keep"], subfolder="unet", dtype=dtype))
        for dtype in (torch.float32, torch.float16)
    ]
    assert reports[0].parts[OTHERS] == 2 * reports[1].parts[OTHERS]
    assert reports[0].parts[PACKED] == reports[1].parts[PACKED]


def test_the_ratio_is_to_all_parameters_of_the_original_in_fp16(packed):
    _, folder = packed
    report = size_report(folder)
    original = sum(p.numel() for p in tiny_unet().parameters())
    assert report.fp16_bytes == 2 * original
    assert report.ratio == pytest.approx(2 * original / file_bytes(folder, ".safetensors", ".json"))


def test_layers_left_alone_count_with_their_real_size(make_config, tmp_path):
    config = make_config(modules_to_not_convert=["conv_in", "attn2"], target_bits=4)
    quantize_model(tiny_unet().half(), config, progress=False).save_pretrained(tmp_path)
    report = size_report(tmp_path)
    others = sum(t.nbytes for n, t in load_file(tmp_path / WEIGHTS).items() if not n.endswith((".codes", ".scale")))
    assert report.parts[OTHERS] == others
    assert report.fp16_bytes == 2 * sum(p.numel() for p in tiny_unet().parameters())
    left = {n: c for n, c in layer_sizes(tiny_unet()).items() if n == "conv_in" or ".attn2." in n}
    cost = sum(log2_levels(layer["bits"]) * math.prod(layer["shape"]) for layer in saved_layers(tmp_path).values())
    total = sum(layer_sizes(tiny_unet()).values())
    assert report.weights == total
    assert report.average_bits.paper == pytest.approx((cost + 16 * sum(left.values())) / total)


# Bits.


def test_the_papers_average_counts_features_and_the_originals_weights(packed):
    kind, folder = packed
    layers = saved_layers(folder)
    cost = sum(log2_levels(layer["bits"]) * math.prod(layer["shape"]) for layer in layers.values())
    if kind != "keep":
        features = sum(m.out_features for n, m in tiny_unet().named_modules() if n.endswith("time_emb_proj"))
        cost += 16 * 50 * features
    weights = sum(layer_sizes(tiny_unet()).values())
    report = size_report(folder)
    assert report.weights == weights
    assert report.average_bits.paper == pytest.approx(cost / weights)


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_met_from_below(packed_folders, make_config, kind):
    paper = size_report(packed_folders[kind] / "unet").average_bits.paper
    assert make_config().target_bits - 0.05 < paper <= make_config().target_bits


def test_the_average_over_layers_leaves_first_and_last_out(packed):
    _, folder = packed
    inner = {n: layer for n, layer in saved_layers(folder).items() if n not in ("conv_in", "conv_out")}
    sizes = {n: math.prod(layer["shape"]) for n, layer in inner.items()}
    cost = sum(log2_levels(inner[n]["bits"]) * sizes[n] for n in inner)
    assert size_report(folder).average_bits.layers == pytest.approx(cost / sum(sizes.values()))


def test_real_bits_are_all_bytes_over_all_weights(packed):
    _, folder = packed
    expected = 8 * file_bytes(folder, ".safetensors", ".json") / sum(layer_sizes(tiny_unet()).values())
    assert size_report(folder).real_bits == pytest.approx(expected)


def test_the_histogram_counts_layers_and_weights_by_bits(packed):
    kind, folder = packed
    histogram = size_report(folder).histogram
    for bits in {layer["bits"] for layer in saved_layers(folder).values()}:
        sizes = [math.prod(layer["shape"]) for layer in saved_layers(folder).values() if layer["bits"] == bits]
        assert histogram[bits] == (len(sizes), sum(sizes))
    counted = {n: c for n, c in layer_sizes(tiny_unet()).items() if kind == "keep" or not is_time(n)}
    assert sum(layers for layers, _ in histogram.values()) == len(counted)
    assert sum(weights for _, weights in histogram.values()) == sum(counted.values())


# Cached time features.


@pytest.mark.parametrize("steps", [10, 25])
def test_cached_features_count_sixteen_bits_a_step(make_config, tmp_path, steps):
    timesteps = list(range(1, 1000, 1000 // steps))
    config = make_config(time_embedding={"type": "cache", "timesteps": timesteps}, recipe=3)
    quantize_model(tiny_unet(), config, progress=False).save_pretrained(tmp_path)
    report = size_report(tmp_path)
    original = tiny_unet()
    features = sum(m.out_features for n, m in original.named_modules() if n.endswith("time_emb_proj"))
    assert report.parts[TIME] == len(timesteps) * (2 * features + 4)
    sizes = {n: count for n, count in layer_sizes(original).items() if not is_time(n)}
    cost = sum((8.0 if n in ("conv_in", "conv_out") else log2_levels(3)) * count for n, count in sizes.items())
    expected = (cost + 16 * len(timesteps) * features) / sum(layer_sizes(original).values())
    assert report.average_bits.paper == pytest.approx(expected)


def test_other_weight_files_in_the_folder_are_not_the_models(packed, tmp_path):
    _, folder = packed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name in ("pytorch_lora_weights", "diffusion_pytorch_model.fp16"):
        save_file({"x": torch.zeros(1000)}, tmp_path / f"{name}.safetensors")
    assert size_report(tmp_path).to_dict() == size_report(folder).to_dict()


def test_a_table_of_classes_has_no_weights_to_count(make_config, tmp_path):
    unet = tiny_unet(num_class_embeds=100)
    report = size_report(quantize_model(unet, make_config(time_embedding="keep"), progress=False))
    assert report.weights == sum(layer_sizes(unet).values())


# Pipelines.


def test_only_components_belong_to_a_pipeline(packed_folders, tmp_path):
    shutil.copytree(packed_folders["keep"], tmp_path, dirs_exist_ok=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "large").write_bytes(bytes(10_000))
    assert size_report(tmp_path).to_dict() == size_report(packed_folders["keep"]).to_dict()


def test_a_pipelines_folder_lists_every_component(packed_folders):
    folder = packed_folders["keep"]
    report = size_report(folder)
    assert report.quantized.keys() == {"unet"}
    assert report.quantized["unet"].to_dict() == size_report(folder / "unet").to_dict()
    assert report.others.keys() == {"scheduler", "text_encoder", "tokenizer", "vae"}
    for name, size in report.others.items():
        assert size == file_bytes(folder / name)


def test_a_pipelines_total_is_in_its_text(packed_folders):
    folder = packed_folders["table"]
    total = sum(file_bytes(folder / name) for name in ("scheduler", "text_encoder", "tokenizer", "vae"))
    total += file_bytes(folder / "unet", ".safetensors", ".json")
    assert f"{total / 1e6:.3f}" in str(size_report(folder)).splitlines()[-1]


# What is printed and what is handed on.


def test_the_text_shows_the_figures(packed):
    _, folder = packed
    report = size_report(folder)
    text = str(report)
    shown = (report.average_bits.paper, report.average_bits.layers, report.real_bits)
    assert all(f"{figure:.4f}" in text for figure in shown)
    assert f"{report.ratio:.2f} times smaller" in text
    assert f"{report.total_bytes / 1e6:.3f}" in text
    for bits, (layers, _) in report.histogram.items():
        levels = 255 if bits == 8 else 2**bits + 1
        assert any(line.split()[:3] == [str(bits), str(levels), str(layers)] for line in text.splitlines())


def test_the_dictionary_survives_json(packed_folders):
    for where in (packed_folders["cache"], packed_folders["cache"] / "unet"):
        content = size_report(where).to_dict()
        assert json.loads(json.dumps(content)).keys() == content.keys()
    assert content["total_bytes"] == file_bytes(packed_folders["cache"] / "unet", ".safetensors", ".json")


# What cannot be counted.


def test_what_is_no_packed_checkpoint_or_not_there_is_named(source_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        size_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        size_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{source_folder / 'unet'} is not quantized by diffusers_bitsfusion"):
        size_report(source_folder / "unet")
    with pytest.raises(ValueError, match=f"No component of the pipeline in {source_folder} is quantized"):
        size_report(source_folder)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text('{"quantization_config": {"quant_method": "bitsfusion"}}')
    save_file({"x": torch.zeros(1)}, damaged / WEIGHTS)
    with pytest.raises(ValueError, match=r"damaged.config.json: .* its config.json is damaged"):
        size_report(damaged)
    with pytest.raises(ValueError, match="This UNet2DConditionModel is not quantized"):
        size_report(tiny_unet())


def test_a_dequantized_model_is_not_counted_as_packed(packed_folders):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["keep"])
    with pytest.raises(ValueError, match="is not quantized"):
        size_report(pipe.unet.dequantize())


def test_a_pipeline_in_memory(packed_folders, source_folder):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["keep"])
    report = size_report(pipe)
    assert report.quantized["unet"] == size_report(pipe.unet)
    vae = sum(tensor.nbytes for tensor in pipe.vae.state_dict().values())
    assert report.others["vae"] == vae and set(report.others) == {"vae", "text_encoder"}
    total = report.quantized["unet"].total_bytes + sum(report.others.values())
    assert report.total_bytes == report.to_dict()["total_bytes"] == total
    assert f"{'whole pipeline':<32}{total / 1e6:>10.3f}" in str(report)
    with pytest.raises(ValueError, match="No component of this StableDiffusionPipeline is quantized"):
        size_report(StableDiffusionPipeline.from_pretrained(source_folder))
