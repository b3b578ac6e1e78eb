"""Pipelines of every family that users bring: quantized, saved and loaded, each samples as its dequantized copy.

The models alone are in test_models.py, ControlNets in test_adapters.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtSigmaPipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from tiny import SD2, SDXL, tiny_pipeline, tiny_unet, tiny_vae
from tiny_transformers import tiny_flux, tiny_pixart, tiny_sana, tiny_sd3
from torch import Tensor

from diffusers_bitsfusion import BitsFusionConfig, quantize_model, size_report
from diffusers_bitsfusion.nn import PackedWeight

pytestmark = pytest.mark.usefixtures("one_thread")


def embeddings(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def stable_diffusion(folder: Path, scheduler=None, kind=StableDiffusionPipeline, **unet) -> DiffusionPipeline:
    """A Stable Diffusion pipeline of another kind, scheduler or UNet."""
    components = tiny_pipeline(folder, **unet).components
    components["scheduler"] = scheduler or components["scheduler"]
    return kind(**components, requires_safety_checker=False)


def sd1(folder: Path):
    return stable_diffusion(folder), {"prompt": "ab"}


def sd2(folder: Path):
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    return stable_diffusion(folder, scheduler, **SD2 | {"cross_attention_dim": 32}), {"prompt": "ab"}


def sd_turbo(folder: Path):
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    pipe = stable_diffusion(folder, scheduler, **SD2 | {"cross_attention_dim": 32})
    return pipe, {"prompt": "ab", "num_inference_steps": 1, "guidance_scale": 0.0}


def img2img(folder: Path):
    pipe = stable_diffusion(folder, kind=StableDiffusionImg2ImgPipeline)
    return pipe, {"prompt": "ab", "image": picture(0), "strength": 0.9}


def inpainting(folder: Path):
    pipe = stable_diffusion(folder, kind=StableDiffusionInpaintPipeline, in_channels=9)
    return pipe, {"prompt": "ab", "image": picture(0), "mask_image": picture(1)}


def lcm(folder: Path):
    components = tiny_pipeline(folder, time_cond_proj_dim=16).components | {"scheduler": LCMScheduler()}
    return LatentConsistencyModelPipeline(**components, requires_safety_checker=False), {"prompt": "ab"}


def sdxl(folder: Path):
    encoders = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(), unet=tiny_unet(**SDXL), scheduler=EulerDiscreteScheduler(), **encoders
    )
    prompts = {"prompt_embeds": embeddings(1, 5, 32), "pooled_prompt_embeds": embeddings(1, 32)}
    return pipe, prompts | {f"negative_{name}": -value for name, value in prompts.items()}


def pixart(folder: Path):
    pipe = PixArtSigmaPipeline(None, None, None, tiny_pixart(), DDIMScheduler())
    mask = torch.ones(1, 5)
    prompts = {"prompt_embeds": embeddings(1, 5, 24), "negative_prompt_embeds": embeddings(1, 5, 24, seed=1)}
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    size = {"height": 64, "width": 64, "use_resolution_binning": False, "negative_prompt": None}
    return pipe, prompts | masks | size


def sd3(folder: Path):
    encoders = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    pipe = StableDiffusion3Pipeline(
        transformer=tiny_sd3(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, **encoders
    )
    prompts = {"prompt_embeds": embeddings(1, 5, 32), "pooled_prompt_embeds": embeddings(1, 16)}
    negative = {f"negative_{name}": -value for name, value in prompts.items()}
    return pipe, prompts | negative | {"height": 64, "width": 64}


def flux(folder: Path):
    encoders = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2")}
    pipe = FluxPipeline(transformer=tiny_flux(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, **encoders)
    prompts = {"prompt_embeds": embeddings(1, 5, 32), "pooled_prompt_embeds": embeddings(1, 16)}
    return pipe, prompts | {"height": 64, "width": 64}


def sana(folder: Path):
    pipe = SanaPipeline(None, None, None, tiny_sana(), FlowMatchEulerDiscreteScheduler())
    prompts = {"prompt_embeds": embeddings(1, 5, 24), "negative_prompt_embeds": embeddings(1, 5, 24, seed=1)}
    masks = dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(1, 5))
    size = {"height": 256, "width": 256, "use_resolution_binning": False, "negative_prompt": None}
    return pipe, prompts | masks | size


FAMILIES: dict[str, Callable] = {
    "SD 1.x": sd1,
    "SD 2.x": sd2,
    "SD-Turbo": sd_turbo,
    "SDXL": sdxl,
    "inpainting": inpainting,
    "img2img": img2img,
    "LCM": lcm,
    "PixArt": pixart,
    "SD3": sd3,
    "Flux": flux,
    "Sana": sana,
}


def sample_latents(pipe: DiffusionPipeline, arguments: dict) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "output_type": "latent"} | arguments
    return pipe(generator=torch.Generator().manual_seed(1), **arguments).images


def denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    return pipe.components.get("unet") or pipe.components["transformer"]


def absent(pipe: DiffusionPipeline) -> dict[str, None]:
    """The components that these tests do without, as `from_pretrained` must be told."""
    return {name: None for name, component in pipe.components.items() if component is None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_pipeline_saves_loads_and_samples_what_its_dequantized_copy_does(family, tmp_path):
    pipe, arguments = FAMILIES[family](tmp_path)
    original = sample_latents(pipe, arguments)
    quantize_model(pipe, BitsFusionConfig(target_bits=2.6, time_embedding="keep"), progress=False)
    found = sample_latents(pipe, arguments)
    assert found.isfinite().all()
    assert (found - original).norm() > 1e-2 * original.norm()
    pipe.save_pretrained(tmp_path / "packed")
    again = type(pipe).from_pretrained(tmp_path / "packed", **absent(pipe))
    assert any(isinstance(layer, PackedWeight) for layer in denoiser(again).modules())
    assert torch.equal(sample_latents(again, arguments), found)
    denoiser(again).dequantize().requires_grad_(False)  # torch chooses kernels by that
    assert torch.equal(sample_latents(again, arguments), found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_quantized_while_loading_is_the_one_quantized_in_memory(family, tmp_path):
    pipe, arguments = FAMILIES[family](tmp_path)
    pipe.save_pretrained(tmp_path / "source")
    config = BitsFusionConfig(target_bits=2.6)
    loaded = type(pipe).from_pretrained(tmp_path / "source", quantization_config=config, **absent(pipe))
    quantize_model(pipe, copy.deepcopy(config), progress=False)
    assert torch.equal(sample_latents(loaded, arguments), sample_latents(pipe, arguments))
    assert size_report(denoiser(loaded)).average_bits.paper <= 2.61
