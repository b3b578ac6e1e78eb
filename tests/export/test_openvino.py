"""Pipelines as OpenVINO models. Most of it needs openvino, in an environment of its own: CONTRIBUTING says how."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tiny import tiny_pipeline

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.export import export_openvino
from diffusers_bitsfusion.export.low_bit import element, pack_elements

SHAPES = Path(__file__).resolve().parents[2] / "examples" / "shapes"


@pytest.mark.parametrize("bits", range(1, 9))
def test_elements_hold_every_code_and_pack_low_bits_first(bits):
    kind = element(bits)
    largest = 127 if bits == 8 else 2 ** (bits - 1)
    codes = np.random.default_rng(bits).integers(-largest, largest + 1, (5, 7, 3)).astype(np.int8)
    packed = pack_elements(codes, kind)
    unpacked = np.unpackbits(packed, bitorder="little").reshape(-1, kind.bits)[: codes.size]
    values = unpacked @ (1 << np.arange(kind.bits))
    if not kind.zero_point:
        values = np.where(values >= 2 ** (kind.bits - 1), values - 2**kind.bits, values)
    assert np.array_equal(values - kind.zero_point, codes.reshape(-1))
    assert len(packed) == -(-codes.size * kind.bits // 8)
    assert kind.bits == {1: 2, 2: 4, 3: 4}.get(bits, 8)


@pytest.fixture
def packed_pipeline(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    pipeline = tiny_pipeline(tmp_path / "tokenizer")
    quantize_model(pipeline.unet, BitsFusionConfig(recipe=1, time_embedding="table"), progress=False)
    return pipeline


def test_without_openvino_what_to_install_is_said(packed_pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ImportError, match=r"needs openvino: pip install .*\[openvino\]"):
        export_openvino(packed_pipeline, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_pipelines_and_dtypes_are_refused_before_anything_is_written(packed_pipeline, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    packed_pipeline.vae.half()
    with pytest.raises(ValueError, match=r"vae is in torch.float16 on cpu: load .* with dtype=torch.float32"):
        export_openvino(packed_pipeline, tmp_path / "out")
    packed_pipeline.unet = None
    with pytest.raises(ValueError, match="unet of StableDiffusionPipeline is NoneType, not UNet2DConditionModel"):
        export_openvino(packed_pipeline, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def calls(folder, compile_model):
    """The exported models, compiled in fp32, by folder."""
    names = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
    hints = {"INFERENCE_PRECISION_HINT": "f32"}
    return {name: compile_model(folder / name / "openvino_model.xml", "CPU", hints) for name in names}


def relative(found, expected):
    return float((torch.from_numpy(found) - expected).norm() / expected.norm())


@torch.no_grad()
def test_each_exported_model_computes_the_same_in_low_bit_constants(packed_pipeline, tmp_path):
    openvino = pytest.importorskip("openvino")
    pipeline, out = packed_pipeline, tmp_path / "out"
    ids, sample, text = torch.arange(77).view(1, 77) % 50, torch.randn(3, 4, 8, 8), torch.randn(3, 77, 32)
    image = torch.rand(1, 3, 16, 16)
    expected = {
        "text_encoder": pipeline.text_encoder(ids).last_hidden_state,
        "unet 7.5": pipeline.unet(sample, torch.tensor(7.5), text).sample,
        "unet 981": pipeline.unet(sample, torch.tensor(981), text).sample,
        "vae_encoder": pipeline.vae.encode(image).latent_dist.parameters,
        "vae_decoder": pipeline.vae.decode(sample).sample,
    }
    export_openvino(pipeline, out)
    models = calls(out, openvino.Core().compile_model)
    found = {
        "text_encoder": models["text_encoder"]({"input_ids": ids})["last_hidden_state"],
        "vae_encoder": models["vae_encoder"]({"sample": image})["latent_parameters"],
        "vae_decoder": models["vae_decoder"]({"latent_sample": sample})["sample"],
    }
    for step in ("7.5", "981"):
        inputs = {"sample": sample, "timestep": np.float32(step), "encoder_hidden_states": text}
        found[f"unet {step}"] = models["unet"](inputs)["out_sample"]
    errors = {name: relative(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < 0.01, errors

    graph = openvino.Core().read_model(out / "unet" / "openvino_model.xml")
    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    assert sum("uint2" in str(node.get_element_type()) for node in constants) > 50
    assert "quantization_config" not in json.loads((out / "unet" / "config.json").read_text())


@torch.no_grad()
def test_pictures_of_optimum_intel_are_those_of_this_package(tmp_path):
    pytest.importorskip("openvino")
    optimum = pytest.importorskip("optimum.intel.openvino")
    unet = UNet2DConditionModel.from_pretrained(SHAPES / "unet-2bit", dtype=torch.float32)
    pipeline = StableDiffusionPipeline.from_pretrained(SHAPES / "pipeline", unet=unet, dtype=torch.float32)

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 10, "output_type": "np", "height": 64, "width": 64}
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        return pipe("a red circle above a blue square", latents=noise, **call).images[0]

    expected = draw(pipeline)
    export_openvino(pipeline, tmp_path)
    hints = {"INFERENCE_PRECISION_HINT": "f32"}
    found = draw(optimum.OVStableDiffusionPipeline.from_pretrained(tmp_path, ov_config=hints))
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.01
