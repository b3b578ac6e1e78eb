"""Features of diffusers that load and save models, on packed ones: each works, or is refused in words that help."""

from __future__ import annotations

import json
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import (
    ComponentsManager,
    DDIMScheduler,
    FluxTransformer2DModel,
    ModularPipeline,
    PipelineQuantizationConfig,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TensorParallelConfig,
    UNet2DConditionModel,
)
from helpers import assert_same_tensors, packed_layers
from single_file import write_single_file
from tiny import SDXL, tiny_tokenizer, tiny_unet, tiny_vae
from tiny_transformers import tiny_flux
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers_bitsfusion import BitsFusionConfig, quantize_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def config(**changes) -> BitsFusionConfig:
    return BitsFusionConfig(**({"recipe": 3, "in_out_bits": 3, "time_embedding": "keep"} | changes))


@pytest.fixture(scope="module")
def packed():
    """What quantizing the UNet of `source_folder` gives."""
    return quantize_model(tiny_unet(), config(), progress=False)


# FlashPack.


def test_flashpack_is_refused_when_saving(packed, source_folder, tmp_path):
    with pytest.raises(ValueError, match=r"FlashPack casts .* Leave out `use_flashpack=True`"):
        packed.save_pretrained(tmp_path / "unet", use_flashpack=True)
    pipe = StableDiffusionPipeline.from_pretrained(source_folder, unet=packed)
    with pytest.raises(ValueError, match="FlashPack casts"):
        pipe.save_pretrained(tmp_path / "pipe", use_flashpack=True)
    assert list(tmp_path.iterdir()) == []


def test_flashpack_is_refused_when_loading(source_folder, packed_folders):
    where = {"subfolder": "unet", "use_flashpack": True}
    with pytest.raises(ValueError, match="FlashPack casts"):
        UNet2DConditionModel.from_pretrained(source_folder, quantization_config=config(), **where)
    with pytest.raises(ValueError, match="FlashPack casts"):
        UNet2DConditionModel.from_pretrained(packed_folders["keep"], **where)
    with pytest.raises(OSError, match=r"model\.flashpack|\.bin"):  # diffusers' own words for a plain folder
        UNet2DConditionModel.from_pretrained(source_folder, **where)


# Files and placement.

CHILDREN = dict.fromkeys((name for name, _ in tiny_unet().named_children()), "cpu")
MAPS = {"auto": "auto", "balanced": "balanced", "balanced_low_0": "balanced_low_0", "sequential": "sequential"}
MAPS |= {"name": "cpu", "device": CPU, "whole": {"": "cpu"}, "children": CHILDREN}


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
def test_quantizing_by_a_device_map_of_every_kind(source_folder, packed, device_map):
    unet = UNet2DConditionModel.from_pretrained(
        source_folder, subfolder="unet", quantization_config=config(), device_map=device_map
    )
    assert_same_tensors(unet, packed)


def test_a_single_file_loads_by_a_device_map(tmp_path):
    write_single_file(tmp_path / "folder", tmp_path, tmp_path / "model.safetensors")
    where = {"config": str(tmp_path / "folder"), "subfolder": "unet", "local_files_only": True}
    arguments = where | {"quantization_config": config()}
    plain = UNet2DConditionModel.from_single_file(str(tmp_path / "model.safetensors"), **arguments)
    mapped = UNet2DConditionModel.from_single_file(str(tmp_path / "model.safetensors"), device_map="auto", **arguments)
    assert_same_tensors(mapped, plain)


@pytest.mark.parametrize("disable_mmap", [False, True])
def test_variant_subfolder_and_shards_together(packed, tmp_path, disable_mmap):
    files = {"variant": "fp16", "max_shard_size": "60KB"}
    where = {"subfolder": "unet", "variant": "fp16", "disable_mmap": disable_mmap}
    tiny_unet().save_pretrained(tmp_path / "source" / "unet", **files)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "source", quantization_config=config(), **where)
    assert_same_tensors(unet, packed)
    unet.save_pretrained(tmp_path / "packed" / "unet", **files | {"max_shard_size": "30KB"})
    assert len(list((tmp_path / "packed" / "unet").glob("*.fp16-*.safetensors"))) > 3
    assert_same_tensors(UNet2DConditionModel.from_pretrained(tmp_path / "packed", **where), packed)


def test_weights_that_are_not_packed_beside_packed_ones_are_told_from_damaged_ones(packed, tmp_path):
    tiny_unet().save_pretrained(tmp_path, variant="fp16")
    packed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not packed, though its config\.json says so.*another `variant`"):
        UNet2DConditionModel.from_pretrained(tmp_path, variant="fp16")
    assert_same_tensors(UNet2DConditionModel.from_pretrained(tmp_path), packed)


@pytest.mark.parametrize("kind", ["sequential", "disk", "device map"])
def test_weights_that_accelerate_keeps_elsewhere_are_not_saved_from_memory(tmp_path, kind, call_unet, packed):
    packed.save_pretrained(tmp_path / "packed")
    if kind == "device map":
        limits = {"max_memory": {"cpu": "100KB"}, "offload_folder": tmp_path / "offload"}
        unet = UNet2DConditionModel.from_pretrained(tmp_path / "packed", device_map="auto", **limits)
    else:
        unet = UNet2DConditionModel.from_pretrained(tmp_path / "packed")
        if kind == "disk":
            accelerate.disk_offload(unet, tmp_path / "offload", execution_device=CPU)
        else:
            accelerate.cpu_offload(unet, execution_device=CPU)
    with pytest.raises(ValueError, match=r"accelerate keeps its weights elsewhere.*Save it before"):
        unet.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert torch.equal(call_unet(unet), call_unet(packed))


def test_an_offloaded_component_is_found_before_anything_of_a_pipeline_is_saved(packed, source_folder, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(source_folder, unet=packed)
    accelerate.cpu_offload(pipe.vae, execution_device=CPU)
    with pytest.raises(ValueError, match="Cannot save this AutoencoderKL: accelerate keeps"):
        pipe.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensor_parallel_is_refused_by_diffusers(tmp_path):
    parallel, message = TensorParallelConfig(tp_degree=2), "tensor.parallel"
    tiny_flux().save_pretrained(tmp_path / "plain")
    transformer = FluxTransformer2DModel.from_pretrained(tmp_path / "plain", quantization_config=config())
    with pytest.raises(ValueError, match=f"is quantized, which cannot be combined with {message}"):
        transformer.enable_parallelism(config=TensorParallelConfig(tp_degree=1))
    transformer.save_pretrained(tmp_path / "packed")
    for folder, more in (("packed", {}), ("plain", {"quantization_config": config()})):
        with pytest.raises(ValueError, match=f"`quantization_config` cannot be combined with a {message}"):
            FluxTransformer2DModel.from_pretrained(tmp_path / folder, parallel_config=parallel, **more)


# Components of pipelines.

UNKNOWN = {
    "components": config(components=["unet", "text_encoder_1"]),
    "mapping": PipelineQuantizationConfig(quant_mapping={"unet": config(), "text_encoder_1": config()}),
    "backend": PipelineQuantizationConfig(
        quant_backend="bitsfusion",
        quant_kwargs={"recipe": 3},
        components_to_quantize=["unet", "text_encoder_1"],
    ),
}


@pytest.mark.parametrize("asked", UNKNOWN.values(), ids=UNKNOWN)
def test_a_component_that_does_not_exist_is_refused_while_loading(source_folder, asked):
    with pytest.raises(ValueError, match=r"no component text_encoder_1 to quantize; it has .*text_encoder, .*unet"):
        StableDiffusionPipeline.from_pretrained(source_folder, quantization_config=asked)


def test_a_pipeline_without_the_default_components_is_not_loaded_in_silence(source_folder, tmp_path):
    index = json.loads((source_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"unet": [None, None]}))
    with pytest.raises(ValueError, match="none of the components"):
        StableDiffusionPipeline.from_pretrained(tmp_path, quantization_config=config())


@pytest.mark.parametrize(
    ("components", "message"),
    [(["unet", "text_encoder_1"], "no component text_encoder_1"), (["unet", "text_encoder"], "quantize_model")],
)
def test_a_single_file_quantizes_all_that_is_asked_for_or_nothing(tmp_path, components, message):
    write_single_file(tmp_path / "folder", tmp_path, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        StableDiffusionPipeline.from_single_file(
            str(tmp_path / "model.safetensors"),
            config=str(tmp_path / "folder"),
            local_files_only=True,
            quantization_config=config(components=components),
        )


def test_bitsandbytes_beside_it(source_folder, packed, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    mapping = {"unet": config(), "text_encoder": BitsAndBytesConfig(load_in_4bit=True)}
    pipe = StableDiffusionPipeline.from_pretrained(
        source_folder, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
    )
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    images = []
    for candidate in (pipe, again):
        assert_same_tensors(candidate.unet, packed)
        assert any(type(module).__name__ == "Linear4bit" for module in candidate.text_encoder.modules())
        candidate.set_progress_bar_config(disable=True)
        arguments = {"num_inference_steps": 1, "height": 16, "width": 16, "output_type": "latent"}
        images.append(candidate("ab", generator=torch.Generator().manual_seed(0), **arguments).images)
    assert images[0].isfinite().all() and torch.equal(*images)


# Modular pipelines.


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory) -> Path:
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=32, **{name: getattr(tokenizer, name) for name in names},
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(), unet=tiny_unet(**SDXL | {"cross_attention_dim": 64}), scheduler=DDIMScheduler(),
        text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text), tokenizer=tokenizer,
        tokenizer_2=tokenizer,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sdxl")
    pipe.save_pretrained(folder)
    return folder


def modular(folder: Path, manager: ComponentsManager | None = None, **load) -> ModularPipeline:
    pipe = ModularPipeline.from_pretrained(str(folder), components_manager=manager)
    names = ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]
    pipe.load_components(names, **load)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def packed_parts(pipe: ModularPipeline) -> set[str]:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert len(parts) == 4
    return {name for name, part in parts.items() if packed_layers(part)}


@pytest.mark.parametrize("components", [None, ["unet", "text_encoder"]])
def test_a_modular_pipeline_quantizes_the_components_that_are_named(sdxl_folder, tmp_path, components):
    asked = config() if components is None else config(components=components)
    manager = ComponentsManager()
    pipe = modular(sdxl_folder, manager, quantization_config=asked)
    assert packed_parts(pipe) == set(components or ["unet"])
    assert manager.get_model_info(manager.get_ids("unet")[0])["quantization"]["recipe"] == 3
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    again = modular(tmp_path)
    assert packed_parts(again) == packed_parts(pipe)
    arguments = {"prompt": "ab", "num_inference_steps": 1, "height": 32, "width": 32, "output_type": "pt"}
    pictures = [
        candidate(output="images", generator=torch.Generator().manual_seed(0), **arguments)
        for candidate in (pipe, again)
    ]
    assert torch.equal(*(torch.as_tensor(picture) for picture in pictures))


def test_a_modular_pipeline_loads_what_a_pipeline_saved(sdxl_folder, tmp_path):
    StableDiffusionXLPipeline.from_pretrained(sdxl_folder, quantization_config=config()).save_pretrained(tmp_path)
    assert packed_parts(modular(tmp_path)) == {"unet"}


def test_a_modular_pipeline_refuses_a_component_that_does_not_exist(sdxl_folder):
    with pytest.raises(ValueError, match="no component unet_2 to quantize"):
        modular(sdxl_folder, quantization_config=config(components=["unet", "unet_2"]))


# Configurations, and numbers of text encoders.


def test_configurations_print_and_serialize_as_those_of_diffusers():
    asked = config()
    assert json.loads(asked.to_json_string()) == {"recipe": 3, "in_out_bits": 3, "time_embedding": "keep"}
    assert json.loads(asked.to_json_string(use_diff=False)) == asked.to_dict()
    assert repr(asked) == f"BitsFusionConfig {asked.to_json_string()}"
    assert asked.to_json_string() == asked.to_json_string(use_diff=True)


def test_modules_to_not_convert_are_whole_parts_of_names(packed):
    with pytest.raises(ValueError, match=r"has no attn\. Did you mean attn2 or attn1\?"):
        quantize_model(tiny_unet(), config(modules_to_not_convert=["attn"]), progress=False)
    some = quantize_model(tiny_unet(), config(modules_to_not_convert=["attn2.to_k", "conv_in"]), progress=False)
    left = packed_layers(packed).keys() - packed_layers(some).keys()
    assert left == {name for name in packed_layers(packed) if name == "conv_in" or name.endswith("attn2.to_k")}


def test_a_packed_text_encoder_has_the_parameters_of_the_float_one_and_the_bytes_of_its_own(source_folder):
    load = {"pretrained_model_name_or_path": source_folder, "subfolder": "text_encoder"}
    plain, encoder = (
        CLIPTextModel.from_pretrained(**load),
        CLIPTextModel.from_pretrained(**load, quantization_config=config()),
    )
    assert len(packed_layers(encoder)) == 12
    assert encoder.num_parameters() == plain.num_parameters()
    assert encoder.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    floats = [p for p in encoder.parameters() if p.requires_grad]
    assert encoder.num_parameters(only_trainable=True) == sum(p.numel() for p in floats)
    stored = [*encoder.parameters(), *encoder.buffers()]
    assert encoder.get_memory_footprint() == sum(tensor.nbytes for tensor in stored) < plain.get_memory_footprint() / 2
    assert encoder.dequantize().num_parameters() == plain.num_parameters()
