"""Training that starts from calibrated rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_unet

from diffusers_bitsfusion import BitsFusionConfig, convert, prepare_qat, quantize_model
from diffusers_bitsfusion.qat import qat_layers


def test_untrained_it_converts_to_what_calibrated_quantization_gives(
    make_pipeline, config, make_calibration, equal_models
):
    expected = quantize_model(make_pipeline(), config, calibration=make_calibration(), progress=False).unet
    pipeline = make_pipeline()
    assert prepare_qat(pipeline, config, calibration=make_calibration()) is pipeline
    found = convert(pipeline.unet)
    assert equal_models(found, expected)
    assert found.hf_quantizer.quantization_config.to_dict() == expected.hf_quantizer.quantization_config.to_dict()


def test_latent_weights_move_as_little_as_they_must(make_pipeline, config, make_calibration):
    pipeline, weights = make_pipeline(), dict(make_pipeline().unet.named_parameters())
    prepare_qat(pipeline, config, calibration=make_calibration())
    moved = 0
    for name, layer in qat_layers(pipeline.unet).items():
        codes, scale = (tensor.double().numpy() for tensor in layer.codes_and_scale())
        before = weights[f"{name}.weight"].detach().double().flatten(1).numpy() / scale[:, None]
        after = layer.weight.detach().double().flatten(1).numpy() / scale[:, None]
        np.testing.assert_allclose(after, codes + np.clip(before - codes, -0.49, 0.49), atol=1e-5)
        moved += int((np.rint(np.clip(before, -2, 2)) != codes).sum())
    assert moved > 0  # calibration chose other codes than the nearest ones


def test_some_layers_alone_can_start_calibrated(make_pipeline, config, make_calibration):
    pipeline = make_pipeline()
    names = [name for name in qat_layers(prepare_qat(make_pipeline().unet, config))][:2]
    prepare_qat(pipeline, config, names, calibration=make_calibration())
    assert list(qat_layers(pipeline.unet)) == names


def test_what_cannot_start_calibrated_is_named(make_pipeline, config, make_calibration):
    with pytest.raises(ValueError, match="a UNet2DConditionModel alone cannot be run: pass the pipeline"):
        prepare_qat(tiny_unet(), config, calibration=True)
    with pytest.raises(ValueError, match="tuning_steps .* Leave them 0"):
        prepare_qat(make_pipeline(), config, calibration=make_calibration(tuning_steps=2))
    with pytest.raises(ValueError, match=r"Of \['prior'\] the pipeline has 0 models to train"):
        prepare_qat(make_pipeline(), BitsFusionConfig(recipe=2, components=["prior"]), calibration=make_calibration())


def test_a_failed_calibration_leaves_the_model_as_it_was(make_pipeline, config, make_calibration):
    pipeline = make_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_in.weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        prepare_qat(pipeline, config, calibration=make_calibration())
    assert not qat_layers(pipeline.unet)
