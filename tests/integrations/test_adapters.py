"""What users put onto a pipeline, on packed models as on dequantized ones."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import (
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
)
from PIL import Image
from tiny import SD2, SDXL, tiny_controlnet, tiny_lora, tiny_unet
from tiny_transformers import tiny_flux, tiny_sana, tiny_sd3
from torch import Tensor, nn

from diffusers_bitsfusion import quantize_model, set_compute, size_report
from diffusers_bitsfusion.integrations.peft_lora import PackedLoraLayer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipes(packed_folders) -> tuple[StableDiffusionPipeline, StableDiffusionPipeline]:
    """A packed pipeline and its dequantized copy."""
    packed, dequantized = (StableDiffusionPipeline.from_pretrained(packed_folders["keep"]) for _ in range(2))
    dequantized.unet.dequantize().requires_grad_(False)  # torch chooses kernels by that
    for pipe in (packed, dequantized):
        pipe.set_progress_bar_config(disable=True)
    return packed, dequantized


def sample_latents(pipe, prompt: str = "ab", **arguments) -> Tensor:
    arguments = {"num_inference_steps": 3, "output_type": "latent", "height": 16, "width": 16} | arguments
    return pipe(prompt, generator=torch.Generator().manual_seed(2), **arguments).images


def assert_equal_but_not(found: Tensor, dequantized: Tensor, plain: Tensor) -> None:
    """Equal to what the dequantized pipeline gives, and different from the image without the adapter."""
    assert torch.equal(found, dequantized)
    assert (found - plain).norm() > 1e-3 * plain.norm()


def test_textual_inversion(pipes):
    generator = torch.Generator().manual_seed(3)
    token = {"<cat>": torch.randn(2, 32, generator=generator)}  # of two vectors
    pictures = []
    for pipe in pipes:
        pipe.load_textual_inversion(token)
        pictures.append(sample_latents(pipe, "a <cat>"))
        plain = sample_latents(pipe, "a")
        pipe.unload_textual_inversion()
    assert_equal_but_not(*pictures, plain)


def test_a_textual_inversion_of_another_width_is_refused(pipes):
    with pytest.raises(ValueError, match="incorrect shape"):
        pipes[0].load_textual_inversion({"<cat>": torch.zeros(1, 48)})


def ip_adapter(unet: nn.Module, image_width: int) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter of random weights, as its files have them: keys by the number of the attention processor."""
    generator, width = torch.Generator().manual_seed(4), unet.config.cross_attention_dim
    layers = {}
    sizes = [module.inner_dim for name, module in unet.named_modules() if name.endswith("attn2")]
    for index, size in enumerate(sizes):
        for kind in ("to_k_ip", "to_v_ip"):
            weight = torch.randn(size, width, generator=generator) / math.sqrt(width)
            layers[f"{2 * index + 1}.{kind}.weight"] = weight
    projection = torch.randn(4 * width, image_width, generator=generator)
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return {
        "image_proj": {"proj.weight": projection, "proj.bias": torch.zeros(4 * width), **norm},
        "ip_adapter": layers,
    }


@pytest.mark.parametrize("kind", ["keep", "table"])
def test_ip_adapter(packed_folders, kind):
    pictures, embeds = [], torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(6))
    for dequantized in (False, True):
        pipe = StableDiffusionPipeline.from_pretrained(packed_folders[kind])
        pipe.set_progress_bar_config(disable=True)
        if dequantized:
            pipe.unet.dequantize().requires_grad_(False)
        plain = sample_latents(pipe)
        pipe.load_ip_adapter(ip_adapter(pipe.unet, 24), subfolder="", weight_name="", image_encoder_folder=None)
        pipe.set_ip_adapter_scale(0.8)
        pictures.append(sample_latents(pipe, ip_adapter_image_embeds=[embeds]))
        pipe.unload_ip_adapter()
        assert torch.equal(sample_latents(pipe), plain)
    if kind == "keep":
        assert_equal_but_not(*pictures, plain)
    else:  # the dequantized model's time embedding is fitted anew
        assert (pictures[0] - pictures[1]).norm() < 1e-3 * pictures[1].norm() < (pictures[0] - plain).norm()


def test_an_ip_adapter_follows_the_models_dtype_and_stays_out_of_its_file(packed_folders, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["keep"], dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    plain = sample_latents(pipe)
    adapter = ip_adapter(pipe.unet, 24)
    pipe.load_ip_adapter(adapter, subfolder="", weight_name="", image_encoder_folder=None)
    assert {p.dtype for p in pipe.unet.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert sample_latents(pipe, ip_adapter_image_embeds=[torch.ones(2, 1, 24, dtype=torch.bfloat16)]).isfinite().all()
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample_latents(again), plain)


def test_an_ip_adapter_beside_integers(packed_folders):
    """It brings its own processors for cross-attention, with which that is diffusers' own."""
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["keep"])
    pipe.set_progress_bar_config(disable=True)
    set_compute(pipe.unet, "int8")
    plain = sample_latents(pipe)
    pipe.load_ip_adapter(ip_adapter(pipe.unet, 24), subfolder="", weight_name="", image_encoder_folder=None)
    assert size_report(pipe.unet).attention_kernels.keys() == {
        name for name, _ in pipe.unet.named_modules() if name.endswith("attn1")
    }
    with_adapter = sample_latents(pipe, ip_adapter_image_embeds=[torch.ones(2, 1, 24)])
    assert with_adapter.isfinite().all() and not torch.equal(with_adapter, plain)
    pipe.unload_ip_adapter()
    set_compute(pipe.unet, "int8")
    assert torch.equal(sample_latents(pipe), plain)


@pytest.mark.parametrize("packed_too", [False, True])
def test_controlnet(pipes, make_config, packed_too):
    torch.manual_seed(1)
    controlnet = tiny_controlnet()
    for module in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        nn.init.normal_(module.weight, std=0.3)  # fresh ones are zero and let nothing through
    if packed_too:
        quantize_model(controlnet, make_config(time_embedding="keep"), progress=False)
    dequantized = copy.deepcopy(controlnet)
    if packed_too:
        dequantized.dequantize().requires_grad_(False)
    pictures = []
    for pipe, control in zip(pipes, (controlnet, dequantized), strict=True):
        guided = StableDiffusionControlNetPipeline(**pipe.components, controlnet=control)
        guided.set_progress_bar_config(disable=True)
        pictures.append(sample_latents(guided, image=Image.new("RGB", (16, 16), "red")))
    assert_equal_but_not(*pictures, sample_latents(pipes[1]))


def test_t2i_adapter(pipes):
    torch.manual_seed(1)
    adapter = T2IAdapter(in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=2).eval()
    pictures = []
    for pipe in pipes:
        components = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
        guided = StableDiffusionAdapterPipeline(**components, adapter=adapter)
        guided.set_progress_bar_config(disable=True)
        pictures.append(sample_latents(guided, image=Image.new("RGB", (16, 16), "red")))
    assert_equal_but_not(*pictures, sample_latents(pipes[1]))


# LoRA through the pipeline; the layers themselves are in test_lora.py.


def pipeline_lora(unet: nn.Module, rank: int, seed: int) -> dict[str, Tensor]:
    return {f"unet.{name}": half for name, half in tiny_lora(unet, ("to_q", "to_v"), rank, seed).items()}


def test_a_lora_is_hot_swapped_through_the_pipeline(pipes):
    loras = [pipeline_lora(pipes[0].unet, rank, seed) for rank, seed in ((4, 0), (8, 1))]
    pictures = []
    for pipe in pipes:
        pipe.enable_lora_hotswap(target_rank=8, check_compiled="ignore")
        pipe.load_lora_weights(loras[0], adapter_name="style")
        before = sample_latents(pipe)
        layers = [id(module) for module in pipe.unet.modules()]
        pipe.load_lora_weights(loras[1], adapter_name="style", hotswap=True)
        assert [id(module) for module in pipe.unet.modules()] == layers
        pictures.append(sample_latents(pipe))
    assert_equal_but_not(*pictures, before)
    pipes[0].load_lora_weights(loras[1], adapter_name="other")
    pipes[0].set_adapters(["other"])
    assert torch.allclose(sample_latents(pipes[0]), pictures[0], rtol=1e-4, atol=1e-5)


def test_hot_swapping_what_is_not_loaded_is_refused(pipes):
    with pytest.raises(ValueError, match="no existing adapter by that name"):
        pipes[0].load_lora_weights(pipeline_lora(pipes[0].unet, 4, 0), adapter_name="style", hotswap=True)


@pytest.mark.parametrize(
    ("lora", "error"),
    [
        ({"unet.mid_block.attentions.7.to_q": (4, 64, 64)}, "not found in the base model"),
        ({"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (4, 48, 48)}, "size mismatch for .*to_q"),
    ],
    ids=["names", "shapes"],
)
def test_a_lora_for_another_architecture_leaves_nothing(pipes, lora, error):
    packed, _ = pipes
    before = sample_latents(packed)
    state = {}
    for name, (rank, inputs, outputs) in lora.items():
        state |= {
            f"{name}.lora_A.weight": torch.ones(rank, inputs),
            f"{name}.lora_B.weight": torch.ones(outputs, rank),
        }
    with pytest.raises((ValueError, RuntimeError), match=error):
        packed.load_lora_weights(state)
    assert packed.get_active_adapters() == []
    assert torch.equal(sample_latents(packed), before)


def test_a_pipeline_fuses_once_and_unfuses_what_was_fused(pipes):
    packed, _ = pipes
    packed.load_lora_weights(pipeline_lora(packed.unet, 4, 0))
    unfused = sample_latents(packed)
    with pytest.warns(UserWarning, match="Already unmerged"):
        packed.unfuse_lora()
    packed.fuse_lora()
    fused = sample_latents(packed)
    with pytest.warns(UserWarning, match="already merged"):
        packed.fuse_lora()
    assert torch.equal(sample_latents(packed), fused)
    packed.unfuse_lora()
    assert torch.equal(sample_latents(packed), unfused)


def test_fusing_query_key_and_value_is_refused_through_the_pipeline(pipes):
    packed, _ = pipes
    before = sample_latents(packed)
    with pytest.raises(ValueError, match=r"dequantize\(\)"):
        packed.fuse_qkv_projections()
    assert torch.equal(sample_latents(packed), before)


FAMILIES = {
    "SD 1.x": tiny_unet,
    "SD 2.x": lambda: tiny_unet(**SD2),
    "SDXL": lambda: tiny_unet(**SDXL),
    "inpainting": lambda: tiny_unet(in_channels=9),
    "LCM": lambda: tiny_unet(time_cond_proj_dim=16),
    "ControlNet": tiny_controlnet,
    "SD3": tiny_sd3,
    "Flux": tiny_flux,
    "Sana": tiny_sana,
}


@pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES)
def test_a_lora_on_a_model_of_every_family_equals_that_on_the_dequantized_one_and_fuses(build, make_config):
    packed = quantize_model(build(), make_config(), progress=False)
    dequantized = copy.deepcopy(packed).dequantize()
    generator = torch.Generator().manual_seed(0)
    for model in (packed, dequantized):
        model.load_lora_adapter(tiny_lora(model, ("to_q", "to_out.0"), rank=2), prefix=None)
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, PackedLoraLayer)}
    assert layers
    for fused in (False, True):
        for name, layer in layers.items():
            x = torch.randn(2, layer.get_base_layer().in_features, generator=generator)
            torch.testing.assert_close(layer(x), dequantized.get_submodule(name)(x), rtol=1e-4, atol=1e-5)
        if not fused:
            packed.fuse_lora()
