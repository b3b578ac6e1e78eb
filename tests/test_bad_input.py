"""Bad input: every error names what is wrong and where, and nothing is lost."""

from __future__ import annotations

import math
import re

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import tiny_controlnet, tiny_unet
from torch import nn

from diffusers_bitsfusion import BitsFusionConfig, Recipe, prepare_qat, quantize_model, set_compute

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "down_blocks.0.resnets.0.conv1"


# The config.


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"target_bits": -1.0}, "target_bits must be positive, got -1.0"),
        ({"target_bits": 0}, "target_bits must be positive, got 0"),
        ({"target_bits": math.nan}, "target_bits must be positive, got nan"),
        ({"target_bits": math.inf}, "target_bits must be positive, got inf"),
        ({"target_bits": "two"}, "target_bits must be a number, got 'two'"),
        ({"in_out_bits": 0}, "in_out_bits.*0"),
        ({"in_out_bits": 17}, "in_out_bits.*17"),
        ({"recipe": 0}, "recipe.*0"),
        ({"recipe": 17}, "recipe.*17"),
        ({"recipe": {"mid_block.resnets.0.conv1": 17}}, "mid_block.resnets.0.conv1.*17"),
        ({"recipe": {"conv_in": 2.5}}, "conv_in.*2.5"),
        ({"scale_init": "best"}, "scale_init.*'best'"),
        ({"scale_iterations": -1}, "scale_iterations.*-1"),
        ({"scale_iterations": 2.5}, "scale_iterations.*2.5"),
        ({"compression": "gzip"}, "compression.*'gzip'"),
        ({"time_embedding": "sometimes"}, "time_embedding.*'sometimes'"),
        ({"time_embedding": {"type": "caches"}}, "time_embedding.*'caches'"),
        ({"time_embedding": {"type": "cache", "timesteps": []}}, r"timesteps.*\[\]"),
        ({"time_embedding": {"type": "cache", "timesteps": [1, 1]}}, r"timesteps.*distinct.*\[1, 1\]"),
        ({"time_embedding": {"type": "cache", "timesteps": [math.nan]}}, "timesteps.*nan"),
    ],
)
def test_an_impossible_value_is_named_with_its_argument(arguments, named):
    with pytest.raises(ValueError, match=named):
        BitsFusionConfig(**arguments)


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="target_bit"):
        BitsFusionConfig(target_bit=2)


def test_an_unknown_key_of_a_saved_config_is_named_with_the_known_ones():
    content = BitsFusionConfig().to_dict() | {"target_bit": 2}
    with pytest.raises(ValueError, match=r"Unknown keys.*: target_bit\. .*target_bits\? Known are: .*target_bits"):
        BitsFusionConfig.from_dict(content)


def test_one_name_is_a_list_of_one_name():
    assert BitsFusionConfig(components="unet").components == ["unet"]
    assert BitsFusionConfig(modules_to_not_convert="conv_in").modules_to_not_convert == ["conv_in"]


# The recipe and the target.


@pytest.fixture
def recipe() -> dict[str, int]:
    """A recipe that fits the tiny UNet."""
    return {name: 3 for name, m in tiny_unet().named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def test_a_recipe_that_fits_is_taken(recipe):
    unet = quantize_model(tiny_unet(), BitsFusionConfig(recipe=recipe), progress=False)
    assert unet.get_submodule(LAYER).bits == 3


def test_layers_of_a_recipe_that_the_model_lacks_are_named(recipe):
    config = BitsFusionConfig(recipe=recipe | {"down_blocks.7.conv": 2})
    with pytest.raises(ValueError, match=r"recipe names layers that the model lacks: down_blocks\.7\.conv\."):
        quantize_model(tiny_unet(), config, progress=False)


def test_names_of_a_recipe_that_are_no_layers_are_named(recipe):
    config = BitsFusionConfig(recipe=recipe | {"down_blocks.0": 2})
    with pytest.raises(ValueError, match=r"layers that the model lacks: down_blocks\.0\."):
        quantize_model(tiny_unet(), config, progress=False)


def test_layers_that_a_recipe_misses_are_named(recipe):
    del recipe[LAYER]
    with pytest.raises(ValueError, match=rf"misses layers that the model has .*: {LAYER}\."):
        quantize_model(tiny_unet(), BitsFusionConfig(recipe=recipe), progress=False)


def test_a_recipe_for_other_shapes_names_the_layer(recipe, tmp_path):
    Recipe(recipe, shapes={LAYER: (320, 320, 3, 3)}).save(tmp_path / "recipe.json")
    config = BitsFusionConfig(recipe=tmp_path / "recipe.json")
    with pytest.raises(ValueError, match=f"layers of another shape: {LAYER}"):
        quantize_model(tiny_unet(), config, progress=False)


def test_a_recipe_that_is_nowhere_is_named():
    with pytest.raises(FileNotFoundError, match=r"No recipe '/nowhere/recipe\.json'"):
        quantize_model(tiny_unet(), BitsFusionConfig(recipe="/nowhere/recipe.json"), progress=False)


@pytest.mark.parametrize("target", [0.5, 1.99, 12.0])
def test_a_target_that_no_assignment_reaches_is_named_with_what_can_be(target):
    with pytest.raises(
        ValueError, match=rf"target_bits={target} cannot be reached.*they take 1\.585 to 7\.011"
    ) as raised:
        quantize_model(tiny_unet(), BitsFusionConfig(target_bits=target), progress=False)
    least, most = map(float, re.search(r"goes from ([\d.]+) to ([\d.]+);", str(raised.value)).groups())
    assert 'time_embedding="table" takes fewer bits' in str(raised.value)
    for reached in (least, most):
        quantize_model(tiny_unet(), BitsFusionConfig(target_bits=reached), progress=False)
    for beyond in (least - 0.01, most + 0.01):
        with pytest.raises(ValueError, match="cannot be reached"):
            quantize_model(tiny_unet(), BitsFusionConfig(target_bits=beyond), progress=False)


def test_a_module_left_alone_that_is_not_there_is_refused_untouched(make_config, call_unet):
    unet = tiny_unet()
    before = call_unet(unet)
    with pytest.raises(ValueError, match=r"UNet2DConditionModel has no conv_inn. Did you mean conv_in"):
        quantize_model(unet, make_config(modules_to_not_convert=["conv_inn", "attn2.to_k"]), progress=False)
    assert torch.equal(call_unet(unet), before)


def test_of_several_components_one_must_have_the_module_left_alone(source_folder):
    config = BitsFusionConfig(recipe=4, components=["unet", "text_encoder"], modules_to_not_convert=["conv_in", "fc1"])
    pipe = quantize_model(StableDiffusionPipeline.from_pretrained(source_folder), config, progress=False)
    assert pipe.unet.conv_in.weight.is_floating_point() and type(pipe.unet.conv_in) is torch.nn.Conv2d
    config.modules_to_not_convert = ["conv_in", "fc3"]
    with pytest.raises(ValueError, match="has no fc3"):
        quantize_model(StableDiffusionPipeline.from_pretrained(source_folder), config, progress=False)


def test_a_refused_recipe_or_target_leaves_the_model_untouched(recipe, call_unet):
    unet = tiny_unet()
    expected = call_unet(unet)
    for config in (BitsFusionConfig(target_bits=0.5), BitsFusionConfig(recipe=recipe | {"nothing": 2})):
        with pytest.raises(ValueError, match=r"cannot be reached|lacks"):
            quantize_model(unet, config, progress=False)
    assert torch.equal(call_unet(unet), expected)
    assert not getattr(unet, "is_quantized", False)


def test_a_pipeline_without_the_components_names_them(source_folder):
    pipe = StableDiffusionPipeline.from_pretrained(source_folder)
    with pytest.raises(ValueError, match=r"none of the components \['unett'\]"):
        quantize_model(pipe, BitsFusionConfig(components=["unett"]), progress=False)


# The source weights.

NOT_FINITE = [
    (f"{LAYER}.weight", math.nan, "keep"),
    ("conv_out.weight", math.inf, "keep"),
    ("time_embedding.linear_1.weight", math.nan, "keep"),
    ("time_embedding.linear_2.weight", -math.inf, "table"),
    ("time_embedding.linear_1.bias", math.nan, "cache"),
    ("mid_block.resnets.1.time_emb_proj.weight", math.nan, "table"),
]


def poisoned_unet(parameter: str, value: float) -> UNet2DConditionModel:
    unet = tiny_unet()
    with torch.no_grad():
        unet.get_parameter(parameter).view(-1)[3] = value
    return unet


@pytest.mark.parametrize(("parameter", "value", "time_embedding"), NOT_FINITE)
def test_a_weight_that_is_not_finite_is_named(make_config, parameter, value, time_embedding):
    config = make_config(time_embedding=time_embedding)
    with pytest.raises(ValueError, match=rf"Cannot quantize.*{parameter}.*(NaN|infinite)"):
        quantize_model(poisoned_unet(parameter, value), config, progress=False)


def test_a_weight_that_is_not_finite_is_named_while_loading(make_config, tmp_path):
    poisoned_unet(f"{LAYER}.weight", math.nan).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"Cannot quantize {LAYER}\.weight.*NaN"):
        UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=make_config())


def test_a_source_that_lacks_a_tensor_is_refused_by_name(make_config, tmp_path):
    tiny_unet().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[f"{LAYER}.weight"]
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"UNet2DConditionModel lacks {LAYER}\.weight"):
        UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=make_config())


def test_a_source_tensor_of_another_shape_is_refused_by_name(make_config, tmp_path):
    tiny_unet().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"][:, :, :1].contiguous()
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{LAYER}\.weight"):
        UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=make_config())


# Timesteps.


def test_an_uncached_timestep_is_named_with_those_there_are(packed_folders, call_unet):
    unet = UNet2DConditionModel.from_pretrained(packed_folders["cache"], subfolder="unet")
    with pytest.raises(ValueError, match=r"Timestep 500: .*cached for the timesteps 1, 21, .*981 only"):
        call_unet(unet, timestep=500)
    assert call_unet(unet, timestep=501).isfinite().all()


def test_another_number_of_steps_than_cached_names_the_first_missing_one(packed_folders):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["cache"])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"Timestep 853: .*Use a scheduler with these steps"):
        pipe("ab", num_inference_steps=7, height=16, width=16)


@pytest.mark.parametrize("timestep", [-1, 1001, 1000.5])
def test_a_timestep_beyond_the_table_is_named_with_its_ends(packed_folders, call_unet, timestep):
    unet = UNet2DConditionModel.from_pretrained(packed_folders["table"], subfolder="unet")
    with pytest.raises(ValueError, match=rf"Timestep {timestep}: .*0 to 1000"):
        call_unet(unet, timestep=timestep)


# Loading without this package, quantizing what cannot be.

WITHOUT_THE_PACKAGE = """
import sys
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

for load, arguments in ((StableDiffusionPipeline, {}), (UNet2DConditionModel, {"subfolder": "unet"})):
    try:
        load.from_pretrained(sys.argv[1], **arguments)
    except ValueError as error:
        print(error)
assert "diffusers_bitsfusion" not in sys.modules
"""


def test_loading_without_the_import_says_that_the_method_is_unknown(packed_folders, run_python):
    result = run_python(WITHOUT_THE_PACKAGE, packed_folders["keep"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Unknown quantization type, got bitsfusion") == 2


def test_quantizing_a_quantized_model_is_refused(packed_unet, make_config, call_unet):
    expected = call_unet(packed_unet)
    with pytest.raises(ValueError, match=r"This UNet2DConditionModel is quantized already\. Call `dequantize\(\)`"):
        quantize_model(packed_unet, make_config(), progress=False)
    assert torch.equal(call_unet(packed_unet), expected)


@pytest.mark.parametrize("kind", ["keep", "table"])
def test_quantizing_a_quantized_pipeline_is_refused(packed_folders, make_config, kind):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders[kind])
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(pipe, make_config(), progress=False)


def test_a_config_given_for_a_quantized_checkpoint_yields_to_its_own(packed_folders, make_config, call_unet):
    expected = UNet2DConditionModel.from_pretrained(packed_folders["keep"], subfolder="unet")
    with pytest.warns(UserWarning, match="already has a `quantization_config` attribute"):
        unet = UNet2DConditionModel.from_pretrained(
            packed_folders["keep"], subfolder="unet", quantization_config=make_config(recipe=4)
        )
    assert unet.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()
    assert torch.equal(call_unet(unet), call_unet(expected))


def test_a_model_with_adapters_is_not_quantized(make_config):
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"This UNet2DConditionModel has adapters. Call `unload_lora_weights\(\)`"):
        quantize_model(unet, make_config(), progress=False)
    unet.unload_lora()
    assert quantize_model(unet, make_config(), progress=False).is_quantized


@pytest.mark.parametrize("function", [quantize_model, prepare_qat])
def test_what_is_no_config_is_refused_with_what_to_write(function):
    unet = tiny_unet()
    for wrong, written in ((2, r"recipe=2"), ({"target_bits": 3}, r"\*\*config")):
        with pytest.raises(TypeError, match=rf"must be a BitsFusionConfig, got .* BitsFusionConfig\({written}\)"):
            function(unet, wrong)
    assert not getattr(unet, "is_quantized", False)


def test_a_compiled_model_is_not_quantized(make_config):
    with pytest.raises(ValueError, match=r"it is compiled\. Quantize the model first"):
        quantize_model(torch.compile(tiny_unet()), make_config(), progress=False)


def test_a_pipeline_is_not_a_model_that_computes(source_folder):
    pipe = StableDiffusionPipeline.from_pretrained(source_folder)
    with pytest.raises(ValueError, match=r"set_compute takes a model, such as `pipe.unet`, got Stable"):
        set_compute(pipe, "int8")


def test_several_controlnets_in_one_are_refused_before_anything_changes(source_folder, make_config):
    controlnets = [tiny_controlnet(), tiny_controlnet(1)]
    pipe = StableDiffusionControlNetPipeline.from_pretrained(source_folder, controlnet=controlnets)
    with pytest.raises(ValueError, match="Cannot quantize controlnet: MultiControlNetModel is no single model"):
        quantize_model(pipe, make_config(components=["unet", "controlnet"]), progress=False)
    assert not getattr(pipe.unet, "is_quantized", False)
