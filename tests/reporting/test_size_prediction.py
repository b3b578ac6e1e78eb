"""The predicted size of a file, against the file."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin
from tiny import tiny_unet
from tiny_transformers import tiny_sd3
from torch import nn

from diffusers_bitsfusion import BitsFusionConfig, quantize_model, size_report
from diffusers_bitsfusion.reporting.size_prediction import model_from_config, predict_size

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = Path(__file__).resolve().parents[2] / "docs" / "configs"
EXACT = ("scales", "biases, norms, other tensors", "LoRA branches")


def gaussian(model: ModelMixin) -> ModelMixin:
    """The same model with weights as the prediction supposes them."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("compression", ["zstd", None])
@pytest.mark.parametrize("kind", ["keep", "cache"])
def test_the_file_is_as_large_as_predicted(tmp_path, kind, compression, dtype):
    config = BitsFusionConfig(target_bits=2.6, time_embedding=kind, compression=compression)
    model = gaussian(tiny_unet(block_out_channels=(64, 128), layers_per_block=2)).to(dtype)
    predicted = predict_size(model, config, dtype)
    quantize_model(model, config, progress=False).save_pretrained(tmp_path)
    found = size_report(tmp_path)
    assert {part: predicted.parts[part] for part in EXACT} == {part: found.parts[part] for part in EXACT}
    assert predicted.histogram == found.histogram
    assert astuple(predicted.average_bits) == pytest.approx(astuple(found.average_bits))
    assert predicted.original_parameters == found.original_parameters and predicted.weights == found.weights
    if kind == "cache":
        assert predicted.parts["time features"] == found.parts["time features"]
    if compression is None:
        assert predicted.parts["packed weights"] == found.parts["packed weights"]
    assert predicted.parts["packed weights"] == pytest.approx(found.parts["packed weights"], rel=0.05)
    assert predicted.parts["headers and config.json"] == pytest.approx(
        found.parts["headers and config.json"], rel=0.25
    )


def test_a_table_is_predicted_in_its_order_of_size(tmp_path):
    config = BitsFusionConfig(recipe=3, time_embedding="table")
    model = tiny_unet(time_embedding_dim=1280)
    predicted = predict_size(model, config)
    quantize_model(model, config, progress=False).save_pretrained(tmp_path)
    found = size_report(tmp_path)
    assert 0.5 < predicted.parts["time features"] / found.parts["time features"] < 2


def test_a_transformer_is_predicted_from_its_config_file_alone(tmp_path):
    model = gaussian(tiny_sd3())
    (tmp_path / "config.json").write_text(model.to_json_string())
    config = BitsFusionConfig(target_bits=3)
    predicted = [predict_size(model_from_config(path), config) for path in (tmp_path, tmp_path / "config.json")]
    assert predicted[0] == predicted[1]
    parts = [report.parts | {"headers and config.json": 0} for report in (predicted[0], predict_size(model, config))]
    assert parts[0] == parts[1]


def test_predicting_leaves_the_model_alone():
    model = model_from_config(CONFIGS / "stable-diffusion-v1-5.json")
    names = list(model.state_dict())
    predict_size(model)
    assert list(model.state_dict()) == names and {p.device.type for p in model.parameters()} == {"meta"}


# Parameters of the published models, in millions: the model cards and papers round them alike.
PARAMETERS = {
    "stable-diffusion-v1-5": 859.52,
    "stable-diffusion-2-1": 865.91,
    "stable-diffusion-xl-base-1.0": 2567.46,
    "sd-controlnet-canny": 361.28,
    "PixArt-Sigma-XL-2-1024-MS": 610.86,
    "stable-diffusion-3-medium": 2028.33,
    "Sana_1600M_1024px": 1604.46,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_full_size_configs_build_models_of_the_known_size(name):
    model = model_from_config(CONFIGS / f"{name}.json")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.01)


def test_the_published_recipe_is_predicted_at_the_size_measured_on_the_whole_model():
    # docs/MODELS.md: 205.3 MB with 50 cached steps, 216.7 MB with a table, and 0.87 MB for its time embedding
    model = model_from_config(CONFIGS / "stable-diffusion-v1-5.json")
    for kind, measured in (("cache", 205.318), ("table", 216.734 + 0.874)):
        predicted = predict_size(model, BitsFusionConfig(time_embedding=kind))
        assert predicted.total_bytes / 1e6 == pytest.approx(measured, rel=0.003)
        assert predicted.average_bits.paper == pytest.approx(1.988, abs=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [({"_class_name": "DDIMScheduler"}, "DDIMScheduler"), ({}, "None"), ({"_class_name": "Nothing"}, "Nothing")],
)
def test_a_config_of_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"names no diffusers model .*{message}"):
        model_from_config(tmp_path)


def test_a_config_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json of a diffusers model"):
        model_from_config(tmp_path)
