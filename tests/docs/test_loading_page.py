"""What docs/loading.md says of the entries that diffusers offers beside `quantization_config=BitsFusionConfig()`."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoModel,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from diffusers_bitsfusion.nn import PackedWeight

pytestmark = pytest.mark.usefixtures("one_thread")


def packed_components(pipe: DiffusionPipeline) -> set[str]:
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {name for name, model in models.items() if any(isinstance(m, PackedWeight) for m in model.modules())}


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    assert tensors(found).keys() == tensors(expected).keys()
    assert all(torch.equal(tensor, tensors(found)[name]) for name, tensor in tensors(expected).items())


@pytest.mark.parametrize("components", [["unet"], "unet", ["unet", "text_encoder"]])
def test_the_name_of_the_method_quantizes_the_components_that_are_named(source_folder, make_config, components):
    kwargs = {"target_bits": 5.0}
    config = PipelineQuantizationConfig(
        quant_backend="bitsfusion", quant_kwargs=kwargs, components_to_quantize=components
    )
    pipe = StableDiffusionPipeline.from_pretrained(source_folder, quantization_config=config)
    named = {components} if isinstance(components, str) else set(components)
    assert packed_components(pipe) == named
    own = make_config(**kwargs, components=sorted(named))
    expected = StableDiffusionPipeline.from_pretrained(source_folder, quantization_config=own)
    assert_same(pipe.unet, expected.unet)


def test_the_name_of_the_method_alone_quantizes_every_model(source_folder):
    config = PipelineQuantizationConfig(quant_backend="bitsfusion", quant_kwargs={"target_bits": 5.0})
    pipe = StableDiffusionPipeline.from_pretrained(source_folder, quantization_config=config)
    assert packed_components(pipe) == {"unet", "text_encoder", "vae"}


def test_a_pipeline_by_the_name_of_the_method_saves_and_reloads(source_folder, tmp_path, call_unet):
    config = PipelineQuantizationConfig(
        quant_backend="bitsfusion", quant_kwargs={"target_bits": 2.6}, components_to_quantize=["unet"]
    )
    pipe = StableDiffusionPipeline.from_pretrained(source_folder, quantization_config=config)
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert packed_components(again) == {"unet"}
    assert torch.equal(call_unet(again.unet), call_unet(pipe.unet))


def test_automodel_quantizes_and_loads_what_the_class_does(source_folder, make_config, tmp_path):
    source = str(source_folder)
    unet = AutoModel.from_pretrained(source, subfolder="unet", quantization_config=make_config())
    assert isinstance(unet, UNet2DConditionModel)
    assert_same(
        unet, UNet2DConditionModel.from_pretrained(source, subfolder="unet", quantization_config=make_config())
    )
    unet.save_pretrained(tmp_path)
    assert_same(AutoModel.from_pretrained(str(tmp_path)), unet)
