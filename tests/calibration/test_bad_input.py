"""Bad input: what is wrong, where, and what to do; a model whose calibration failed is as it was."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from tiny import tiny_unet

from diffusers_bitsfusion import BitsFusionConfig, Calibration, quantize_model
from diffusers_bitsfusion.config.calibration import default_prompts


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prompts": []}, "prompts are an empty list"),
        ({"prompts": "a cat"}, "prompts must be a list of texts, got 'a cat'"),
        ({"prompts": ["a cat", 3]}, "prompts must be a list of texts"),
        ({"num_samples": 0}, "num_samples.*0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps.*2.5"),
        ({"batch_size": True}, "batch_size.*True"),
        ({"tuning_steps": -1}, "tuning_steps.*-1"),
        ({"seed": -1}, "seed.*-1"),
        ({"memory_gb": 0}, "memory_gb.*0"),
        ({"memory_gb": float("nan")}, "memory_gb.*nan"),
        ({"steps": 5}, "calibration has no steps; it has batch_size"),
    ],
)
def test_an_impossible_setting_is_named(settings, named):
    with pytest.raises(ValueError, match=named):
        BitsFusionConfig(calibration=settings)


def test_a_calibration_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"calibration must be None, True, a Calibration or a dict.* got 'yes'"):
        BitsFusionConfig(calibration="yes")


def test_a_config_reads_what_it_writes():
    asked = BitsFusionConfig(calibration=Calibration(prompts=("a cat",), seed=3))
    assert asked.to_dict()["calibration"]["prompts"] == ["a cat"]
    again = BitsFusionConfig.from_dict(asked.to_dict())
    assert again.to_dict() == asked.to_dict() and again.calibration.seed == 3
    assert BitsFusionConfig(calibration=True).calibration == Calibration()


def test_the_shipped_prompts_are_many_and_different():
    prompts = default_prompts()
    assert len(set(prompts)) == len(prompts) >= 4 * Calibration().num_samples and all(p.strip() == p for p in prompts)


def test_loading_says_when_to_calibrate(source_folder):
    config = BitsFusionConfig(target_bits=2.6, calibration=True)
    with pytest.raises(ValueError, match=r"cannot be done while loading.*quantize_model\(pipeline, config\)"):
        StableDiffusionPipeline.from_pretrained(source_folder, quantization_config=config)


def test_a_model_alone_cannot_be_run(config):
    with pytest.raises(ValueError, match=r"a UNet2DConditionModel alone cannot be run.*quantize_model\(pipeline"):
        quantize_model(tiny_unet(), config, calibration=True)


def test_a_pipeline_must_take_prompts(config):
    with pytest.raises(ValueError, match="DDPMPipeline takes none"):
        quantize_model(DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler()), config, calibration=True)


def test_a_component_that_the_pipeline_lacks(make_pipeline, make_calibration):
    config = BitsFusionConfig(recipe=2, components=["transformer"])
    with pytest.raises(ValueError, match=r"none of the components \['transformer'\]"):
        quantize_model(make_pipeline(), config, calibration=make_calibration())


def test_nan_inputs_name_the_first_layer_that_sees_them(make_pipeline, config, make_calibration):
    pipeline = make_pipeline()
    with torch.no_grad():
        pipeline.unet.down_blocks[0].resnets[0].norm2.weight[0] = torch.finfo(torch.float32).max
    before = [type(module) for module in pipeline.unet.modules()]
    pipeline.set_progress_bar_config(disable=True, leave=False)
    with pytest.raises(ValueError, match=r"The input of down_blocks.0.resnets.0.conv2 holds NaN"):
        quantize_model(pipeline, config, progress=False, calibration=make_calibration())
    assert [type(module) for module in pipeline.unet.modules()] == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in pipeline.unet.modules())
    assert pipeline._progress_bar_config == {"disable": True, "leave": False}


def test_too_little_memory_is_said_before_anything_is_sampled(make_pipeline, config, make_calibration):
    with pytest.raises(ValueError, match="memory_gb=1e-06 is too little"):
        quantize_model(make_pipeline(), config, progress=False, calibration=make_calibration(memory_gb=1e-6))


def test_a_cache_of_another_calibration_is_refused(make_pipeline, config, make_calibration, tmp_path):
    folder = tmp_path / "cache"
    quantize_model(
        make_pipeline(), config, progress=False, calibration=make_calibration(num_samples=1, cache_dir=folder)
    )
    with pytest.raises(ValueError, match="holds a calibration with other seed; delete it"):
        other = make_calibration(num_samples=1, seed=1, cache_dir=folder)
        quantize_model(make_pipeline(), config, progress=False, calibration=other)


def spaced_otherwise(pipeline):
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, timestep_spacing="linspace")


def with_another_norm(pipeline):
    with torch.no_grad():
        pipeline.unet.conv_norm_out.weight[-1] += 1e-3


def with_another_text_encoder(pipeline):
    with torch.no_grad():
        next(pipeline.text_encoder.parameters())[-1] += 1e-3


@pytest.mark.parametrize(
    ("change", "named"),
    [(spaced_otherwise, "scheduler"), (with_another_norm, "weights"), (with_another_text_encoder, "weights")],
)
def test_a_cache_of_another_pipeline_is_refused(make_pipeline, config, make_calibration, tmp_path, change, named):
    calibration = make_calibration(num_samples=1, cache_dir=tmp_path / "cache")
    quantize_model(make_pipeline(), config, progress=False, calibration=calibration)
    quantize_model(make_pipeline(), config, progress=False, calibration=calibration)
    pipeline = make_pipeline()
    change(pipeline)
    with pytest.raises(ValueError, match=f"holds a calibration with other {named}; delete it"):
        quantize_model(pipeline, config, progress=False, calibration=calibration)


def test_a_pipeline_that_starts_from_images(make_pipeline, config, make_calibration):
    pipeline = StableDiffusionImg2ImgPipeline.from_pipe(make_pipeline())
    with pytest.raises(ValueError, match=r"starts from images \(it takes strength\).*AutoPipelineForText2Image"):
        quantize_model(pipeline, config, calibration=make_calibration())


def test_a_folder_of_other_things_is_refused(make_pipeline, config, make_calibration, tmp_path):
    (tmp_path / "cache" / "unet").mkdir(parents=True)
    (tmp_path / "cache" / "unet" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no calibration"):
        calibration = make_calibration(cache_dir=tmp_path / "cache")
        quantize_model(make_pipeline(), config, progress=False, calibration=calibration)
