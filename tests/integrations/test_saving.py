"""Saving and what comes back: bit for bit, all or nothing, and free of this package after `dequantize()`."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from helpers import assert_same_tensors
from hub_server import content
from tiny import tiny_unet

from diffusers_bitsfusion import quantize_model, size_report
from diffusers_bitsfusion.nn import PackedWeight, TimeFeatures

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("keep", "table", "cache")
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def load_unet(folder: Path, **arguments) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, **arguments)


# Reloading.

RELOAD = """
import sys
import torch
from diffusers import UNet2DConditionModel
import diffusers_bitsfusion

cases = torch.load(sys.argv[1])
generator = torch.Generator().manual_seed(7)
for case in cases:
    unet = UNet2DConditionModel.from_pretrained(case["folder"])
    state = unet.state_dict()
    assert state.keys() == case["state"].keys(), case["folder"]
    for name, tensor in case["state"].items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), (case["folder"], name)
    with torch.no_grad():
        output = unet(case["sample"], 501, case["states"]).sample
    assert torch.equal(output, case["output"]), case["folder"]
    print("equal", case["folder"])
"""


def test_a_fresh_process_reloads_bit_for_bit_without_arguments(tmp_path, make_config, run_python):
    torch.manual_seed(3)
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    cases = []
    for kind in KINDS:
        unet = quantize_model(tiny_unet(), make_config(time_embedding=kind), progress=False)
        with torch.no_grad():
            output = unet(sample, 501, states).sample
        for shard_size in ("10GB", "60KB"):
            folder = tmp_path / f"{kind}-{shard_size}"
            unet.save_pretrained(folder, max_shard_size=shard_size)
            case = {"folder": str(folder), "state": unet.state_dict(), "output": output}
            cases.append(case | {"sample": sample, "states": states})
    assert not (tmp_path / "keep-10GB" / INDEX).exists() and (tmp_path / "keep-60KB" / INDEX).exists()
    torch.save(cases, tmp_path / "cases.pt")
    result = run_python(RELOAD, tmp_path / "cases.pt")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal") == len(cases)


def test_a_reloaded_pipeline_samples_the_same_image(packed_folders, tmp_path):
    arguments = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["keep"])
    pipe.save_pretrained(tmp_path)
    images = []
    for candidate in (pipe, StableDiffusionPipeline.from_pretrained(tmp_path)):
        candidate.set_progress_bar_config(disable=True)
        images.append(candidate("ab", generator=torch.Generator().manual_seed(1), **arguments).images)
    assert (images[0] == images[1]).all()


def test_saving_again_writes_the_same_bytes(packed_unet, tmp_path):
    packed_unet.save_pretrained(tmp_path / "first")
    load_unet(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = content(tmp_path / "first"), content(tmp_path / "second")
    assert first[WEIGHTS] == second[WEIGHTS]
    configs = [json.loads(files["config.json"]) for files in (first, second)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("kind", KINDS)
def test_uncompressed_files_hold_the_same_model(tmp_path, make_config, kind):
    config = make_config(time_embedding=kind, compression=None)
    unet = quantize_model(tiny_unet(), config, progress=False)
    unet.save_pretrained(tmp_path)
    assert_same_tensors(load_unet(tmp_path), unet)
    compressed = quantize_model(tiny_unet(), make_config(time_embedding=kind), progress=False)
    assert_same_tensors(compressed, unet)


def test_uncompressed_codes_lie_in_the_file_as_rows_of_bytes(tmp_path, make_config):
    quantize_model(tiny_unet(), make_config(compression=None), progress=False).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    layers = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    codes_per_byte = {1: 5, 2: 3, 3: 2}
    for name, layer in layers.items():
        rows, columns = layer["shape"][0], torch.Size(layer["shape"][1:]).numel()
        width = -(-columns // codes_per_byte.get(layer["bits"], 1))
        assert tuple(tensors[f"{name}.codes"].shape) == (rows, width), name


def test_saving_unsharded_over_shards_leaves_none_of_them(packed_unet, tmp_path, call_unet):
    packed_unet.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 2 and (tmp_path / INDEX).exists()
    packed_unet.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("diffusion*")] == [WEIGHTS]
    assert torch.equal(call_unet(load_unet(tmp_path)), call_unet(packed_unet))


def test_saving_shards_over_a_single_file_leaves_it_not(packed_unet, tmp_path):
    packed_unet.save_pretrained(tmp_path)
    packed_unet.save_pretrained(tmp_path, max_shard_size="60KB")
    assert not (tmp_path / WEIGHTS).exists() and (tmp_path / INDEX).exists()
    assert_same_tensors(load_unet(tmp_path), packed_unet)


def test_saving_fewer_shards_over_more_removes_the_rest(packed_unet, tmp_path):
    packed_unet.save_pretrained(tmp_path, max_shard_size="40KB")
    packed_unet.save_pretrained(tmp_path, max_shard_size="90KB")
    named = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
    assert {file.name for file in tmp_path.glob("*.safetensors")} == named
    assert_same_tensors(load_unet(tmp_path), packed_unet)


def test_saving_keeps_the_users_other_files(packed_unet, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "lora.safetensors").write_bytes(b"mine too")
    packed_unet.save_pretrained(tmp_path, max_shard_size="60KB")
    packed_unet.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "lora.safetensors").read_bytes() == b"mine too"


def test_a_variant_stands_beside_the_plain_file(packed_unet, tmp_path):
    packed_unet.save_pretrained(tmp_path)
    packed_unet.save_pretrained(tmp_path, variant="small")
    assert (tmp_path / WEIGHTS).exists()
    assert_same_tensors(load_unet(tmp_path, variant="small"), packed_unet)
    assert_same_tensors(load_unet(tmp_path), packed_unet)


def test_arguments_of_the_pipelines_save_reach_the_packed_model(packed_folders, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["keep"])
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert (tmp_path / "shards" / "unet" / INDEX).exists()
    assert_same_tensors(StableDiffusionPipeline.from_pretrained(tmp_path / "shards").unet, pipe.unet)
    pipe.save_pretrained(tmp_path / "variant", variant="small")
    assert_same_tensors(StableDiffusionPipeline.from_pretrained(tmp_path / "variant", variant="small").unet, pipe.unet)


@pytest.mark.parametrize("what", ["model", "pipeline"])
def test_pushing_while_saving_uploads_to_the_repository_named_by_the_folder(packed_folders, tmp_path, uploads, what):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["keep"])
    saved = pipe if what == "pipeline" else pipe.unet
    saved.save_pretrained(str(tmp_path / "sd15-2bit"), push_to_hub=True)
    weights = {"pipeline": f"unet/{WEIGHTS}", "model": WEIGHTS}[what]
    ((repository, files),) = uploads
    assert repository == "me/sd15-2bit"
    assert files[weights] == (tmp_path / "sd15-2bit" / weights).read_bytes()


@pytest.mark.parametrize("what", ["model", "pipeline"])
def test_what_is_pushed_has_a_card_with_its_figures(packed_folders, uploads, what):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["keep"])
    (pipe if what == "pipeline" else pipe.unet).push_to_hub("me/sd15-2bit")
    ((repository, files),) = uploads
    report = size_report(packed_folders["keep"] / "unet")
    card = files["README.md"].decode()
    assert repository == "me/sd15-2bit"
    assert "import diffusers_bitsfusion" in card
    assert f"{report.average_bits.paper:.3f}" in card and f"{report.average_bits.layers:.3f}" in card


@pytest.mark.parametrize("what", ["model", "pipeline"])
def test_what_is_pushed_as_a_variant_says_so(packed_folders, tmp_path, uploads, what):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["keep"])
    saved = pipe if what == "pipeline" else pipe.unet
    saved.save_pretrained(str(tmp_path / "out"), variant="fp16", push_to_hub=True, repo_id="me/out")
    ((_, files),) = uploads
    line = 'from_pretrained("me/out", variant="fp16", dtype=torch.float32)'
    assert line in files["README.md"].decode() and line in (tmp_path / "out" / "README.md").read_text()


def test_a_card_of_our_own_is_renewed_with_the_model(tmp_path, make_config):
    for bits in (2, 5):
        quantize_model(tiny_unet(), make_config(recipe=bits), progress=False).save_pretrained(tmp_path)
        assert f"{size_report(tmp_path).average_bits.paper:.3f}" in (tmp_path / "README.md").read_text()


def test_an_unquantized_pipeline_saves_as_it_always_did(source_folder, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(source_folder)
    pipe.save_pretrained(tmp_path)
    assert_same_tensors(load_unet(tmp_path / "unet"), pipe.unet)
    assert "quantization_config" not in json.loads((tmp_path / "unet" / "config.json").read_text())


def test_class_names_in_the_files_are_those_of_diffusers(packed_folders):
    index = json.loads((packed_folders["keep"] / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert json.loads((packed_folders["keep"] / "unet" / "config.json").read_text())["_class_name"] == index["unet"][1]


def test_the_saved_config_is_plain_json_that_names_method_and_layers(packed_folders):
    config = json.loads((packed_folders["table"] / "unet" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsfusion" and config["format_version"] == 1
    assert config["layers"]["conv_in"] == {"bits": 8, "shape": [32, 4, 3, 3]}


# Dequantizing.


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_leaves_nothing_of_this_package(make_config, kind):
    unet = quantize_model(tiny_unet(), make_config(time_embedding=kind), progress=False)
    assert unet.dequantize() is unet
    assert not any(isinstance(m, (PackedWeight, TimeFeatures)) for m in unet.modules())
    assert type(unet) is UNet2DConditionModel
    assert all(p.is_floating_point() for p in unet.parameters())
    assert "quantization_config" not in unet.config
    assert not getattr(unet, "is_quantized", False)
    assert not hasattr(unet, "hf_quantizer") and not hasattr(unet, "quantization_method")
    assert unet.half().dtype == torch.float16


def test_a_dequantized_model_quantizes_saves_and_loads_again(make_config, packed_unet, tmp_path):
    again = quantize_model(packed_unet.dequantize(), make_config(), progress=False)
    assert again.is_quantized and isinstance(again.conv_in, PackedWeight)
    again.save_pretrained(tmp_path)
    assert_same_tensors(load_unet(tmp_path), again)


WITHOUT_THE_PACKAGE = """
import sys
import torch
from diffusers import UNet2DConditionModel

for case in torch.load(sys.argv[1]):
    unet = UNet2DConditionModel.from_pretrained(case["folder"])
    state = unet.state_dict()
    assert state.keys() == case["state"].keys(), case["folder"]
    assert all(torch.equal(state[name], tensor) for name, tensor in case["state"].items()), case["folder"]
    with torch.no_grad():
        output = unet(case["sample"], 501, case["states"]).sample
    assert torch.equal(output, case["output"]), case["folder"]
    print("equal", case["folder"])
assert not any(name.split(".")[0] == "diffusers_bitsfusion" for name in sys.modules)
"""


def test_a_dequantized_model_loads_where_this_package_is_unknown(tmp_path, make_config, run_python):
    torch.manual_seed(3)
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    cases = []
    for kind in KINDS:
        folder = tmp_path / kind
        unet = quantize_model(tiny_unet(), make_config(time_embedding=kind), progress=False)
        with torch.no_grad():
            packed_output = unet(sample, 501, states).sample
            output = unet.dequantize()(sample, 501, states).sample
        torch.testing.assert_close(output, packed_output, rtol=1e-3, atol=1e-3)
        unet.save_pretrained(folder)
        case = {"folder": str(folder), "state": unet.state_dict(), "output": output}
        cases.append(case | {"sample": sample, "states": states})
    torch.save(cases, tmp_path / "cases.pt")
    result = run_python(WITHOUT_THE_PACKAGE, tmp_path / "cases.pt")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal") == len(cases)


def test_a_pipeline_of_a_dequantized_model_saves_plain(packed_folders, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["table"])
    pipe.unet.dequantize()
    pipe.save_pretrained(tmp_path)
    assert b"bitsfusion" not in (tmp_path / "unet" / "config.json").read_bytes()
    assert_same_tensors(StableDiffusionPipeline.from_pretrained(tmp_path).unet, pipe.unet)


def test_dequantize_after_reload_gives_the_dtype_of_the_load(packed_folders, call_unet):
    unet = load_unet(packed_folders["table"], subfolder="unet", dtype=torch.float16).dequantize()
    assert {p.dtype for p in unet.parameters()} == {torch.float16}
    assert call_unet(unet).isfinite().all()


# What a quantized model refuses.


def test_pickle_files_are_refused(packed_unet, tmp_path):
    with pytest.raises(ValueError, match="safetensors only"):
        packed_unet.save_pretrained(tmp_path, safe_serialization=False)
    assert content(tmp_path) == {}


def test_a_pipeline_with_a_packed_model_refuses_pickle_files_too(packed_folders, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["keep"])
    with pytest.raises(ValueError, match="safetensors only"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert content(tmp_path) == {}


def test_casting_is_refused_in_the_words_of_diffusers(packed_unet):
    with pytest.raises(ValueError, match="Casting a quantized model to a new `dtype` is unsupported"):
        packed_unet.to(torch.float16)
    with pytest.raises(ValueError, match=r"`\.half\(\)` is not supported for quantized model"):
        packed_unet.half()
    with pytest.raises(ValueError, match=r"`\.float\(\)` is not supported for quantized model"):
        packed_unet.float()
    before = packed_unet.state_dict()
    for cast in (packed_unet.bfloat16, packed_unet.double, lambda: packed_unet.type(torch.float16)):
        with pytest.raises(ValueError, match="Casting a quantized model to a new `dtype` is unsupported"):
            cast()
    assert {name: tensor.dtype for name, tensor in packed_unet.state_dict().items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }


def test_a_model_whose_packed_layers_were_replaced_is_not_saved(packed_unet, tmp_path):
    packed_unet.conv_in = torch.nn.Conv2d(9, packed_unet.conv_in.out_channels, 3, padding=1)
    with pytest.raises(ValueError, match=r"its packed layers conv_in were replaced or removed.*dequantize\(\)"):
        packed_unet.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_moving_without_casting_is_allowed(packed_unet, call_unet):
    expected = call_unet(packed_unet)
    for own in (("cpu",), (torch.float32,), ("cpu", torch.float32), (None, None)):
        assert torch.equal(call_unet(packed_unet.to(*own)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_pipeline_shares_a_packed_model(source_folder, make_config, dtype):
    pipe = StableDiffusionPipeline.from_pretrained(source_folder, quantization_config=make_config(), dtype=dtype)
    pipe.to("cpu", dtype)
    image_to_image = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert image_to_image.unet is pipe.unet and image_to_image.unet.is_quantized
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {dtype}
    with pytest.raises(ValueError, match="Casting a quantized model"):
        StableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=torch.float16)


def test_a_pipeline_without_a_packed_model_is_taken_over_as_ever(source_folder):
    pipe = StableDiffusionPipeline.from_pretrained(source_folder, dtype=torch.bfloat16)
    assert StableDiffusionImg2ImgPipeline.from_pipe(pipe).dtype == torch.float32  # as diffusers does


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_is_the_same_model(make_config, call_unet, tmp_path, kind):
    unet = quantize_model(tiny_unet(), make_config(time_embedding=kind), progress=False)
    again = pickle.loads(pickle.dumps(unet))
    assert_same_tensors(again, unet)
    assert torch.equal(call_unet(again), call_unet(unet))
    again.save_pretrained(tmp_path)
    assert torch.equal(call_unet(load_unet(tmp_path)), call_unet(unet))
    assert type(again.dequantize()) is UNet2DConditionModel


def test_other_processes_save_weights_alone_as_diffusers_has_them_do(packed_unet, tmp_path, call_unet):
    packed_unet.save_pretrained(tmp_path, is_main_process=False)
    assert content(tmp_path).keys() == {WEIGHTS}
    packed_unet.save_pretrained(tmp_path)
    packed_unet.save_pretrained(tmp_path, is_main_process=False)
    assert {"config.json", "README.md", WEIGHTS} <= content(tmp_path).keys()
    assert torch.equal(call_unet(load_unet(tmp_path)), call_unet(packed_unet))


def test_a_reloaded_model_refuses_casting_as_well(packed_folders):
    unet = load_unet(packed_folders["keep"], subfolder="unet")
    with pytest.raises(ValueError, match="Casting a quantized model"):
        unet.to(torch.bfloat16)


def test_packed_parameters_cannot_require_gradients(packed_unet):
    with pytest.raises(RuntimeError, match="floating point"):
        packed_unet.requires_grad_(True)
    assert not packed_unet.requires_grad_(False).conv_in.codes.requires_grad


def test_fusing_query_key_and_value_is_refused(packed_unet, packed_folders):
    with pytest.raises(ValueError, match=r"fuse_qkv_projections\(\) cannot join packed layers"):
        packed_unet.fuse_qkv_projections()
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["keep"])
    with pytest.raises(ValueError, match="dequantize"):
        pipe.fuse_qkv_projections()


def test_a_dequantized_model_may_fuse_query_key_and_value(packed_unet, call_unet):
    packed_unet.dequantize()
    expected = call_unet(packed_unet)
    packed_unet.fuse_qkv_projections()
    torch.testing.assert_close(call_unet(packed_unet), expected, rtol=1e-4, atol=1e-4)


# Attributes and copies.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_original_dtype_is_recorded(make_config, dtype):
    unet = quantize_model(tiny_unet().to(dtype), make_config(), progress=False)
    assert unet.config["_pre_quantization_dtype"] == dtype
    assert unet.dtype == dtype


def test_the_memory_footprint_shrinks(make_config):
    source = tiny_unet()
    parameters = sum(p.numel() for p in source.parameters())
    before = source.get_memory_footprint()
    assert before >= 4 * parameters
    packed = quantize_model(source, make_config(), progress=False)
    # All weights in at most 8 bits, most in about 2: biases, norms and scales are the rest.
    assert packed.get_memory_footprint() < before / 4
    assert packed.get_memory_footprint() == sum(p.nbytes for p in packed.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_is_a_model_of_its_own(make_config, call_unet, tmp_path, kind):
    unet = quantize_model(tiny_unet(), make_config(time_embedding=kind), progress=False)
    expected = call_unet(unet)
    dequantized = copy.deepcopy(unet)
    assert_same_tensors(dequantized, unet)
    dequantized.dequantize()
    assert isinstance(unet.conv_in, PackedWeight) and unet.is_quantized and hasattr(unet, "hf_quantizer")
    assert torch.equal(call_unet(unet), expected)
    unet.save_pretrained(tmp_path)
    assert torch.equal(call_unet(load_unet(tmp_path)), expected)


@pytest.mark.parametrize("compression", ["zstd", None])
def test_loading_does_not_lock_or_map_the_file(make_config, tmp_path, call_unet, compression):
    quantize_model(tiny_unet(), make_config(compression=compression), progress=False).save_pretrained(tmp_path)
    loaded = load_unet(tmp_path)
    expected = call_unet(loaded)
    (tmp_path / WEIGHTS).write_bytes(bytes((tmp_path / WEIGHTS).stat().st_size))
    assert torch.equal(call_unet(loaded), expected)
