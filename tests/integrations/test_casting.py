"""Packed models that pipelines cast: autoencoders in fp16 that decode in fp32, as those of SDXL do."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_pipeline, tiny_vae

from diffusers_bitsfusion import BitsFusionConfig, quantize_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_autoencoder_that_decodes_in_fp32_is_cast_and_cast_back():
    vae = tiny_vae().half()
    assert vae.config.force_upcast  # SDXL's pipelines cast such a one to decode.
    quantize_model(vae, BitsFusionConfig(target_bits=3), progress=False)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    latents = torch.randn(1, 4, 8, 8)
    vae.to(dtype=torch.float32)
    with torch.no_grad():
        found, expected = (model.decode(latents).sample for model in (vae, copy.deepcopy(vae).dequantize()))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match="holds codes"):
        vae.type(torch.float16)
    vae.to("cpu", torch.float16)
    after = vae.state_dict()
    assert vae.dtype == torch.float16
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )


def test_a_pipeline_with_a_compiled_packed_model_refuses_before_it_casts_another(tmp_path):
    pipe = tiny_pipeline(tmp_path)
    quantize_model(pipe, BitsFusionConfig(target_bits=3), progress=False)
    pipe.unet = torch.compile(pipe.unet)
    for cast in (lambda: pipe.to(torch.float16), lambda: pipe.to("cpu", torch.float16)):
        with pytest.raises(ValueError, match="Casting a quantized model"):
            cast()
    assert {part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)} == {torch.float32}
    dtypes = {bias.dtype for name, bias in pipe.unet.named_parameters() if name.endswith("bias")}
    assert dtypes == {torch.float32}
