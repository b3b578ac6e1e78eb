"""Features of diffusers that run models, on packed ones: each does what it does on the dequantized model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conformance.case import Case, flat_output
from conformance.image_models import CASES as IMAGES
from conformance.video_models import CASES as VIDEOS
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxPipeline,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import MagCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from helpers import all_packed_layers
from safetensors.torch import save_file
from tiny import tiny_lora, tiny_unet
from tiny_transformers import tiny_flux
from torch import Tensor, nn

from diffusers_bitsfusion import BitsFusionConfig, quantize_model, set_compute

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CASES = {**IMAGES, **VIDEOS}
FLUX = "FluxTransformer2DModel"


def config(**changes) -> BitsFusionConfig:
    return BitsFusionConfig(**({"recipe": 4, "in_out_bits": 4, "time_embedding": "keep"} | changes))


def pack(model: nn.Module, **changes) -> nn.Module:
    return quantize_model(model, config(**changes), progress=False)


def both(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The packed model and the dequantized one, without gradients, as packed weights are."""
    return pack(build()), pack(build()).dequantize().requires_grad_(False)


def call(model: nn.Module, name: str = FLUX, factor: float = 1.0) -> Tensor:
    arguments = CASES[name].arguments()
    arguments["hidden_states"] = arguments["hidden_states"] * factor
    with torch.no_grad():
        return flat_output(model(**arguments))


# Attention, caches, FreeU.


@pytest.mark.parametrize("first", ["backend", "compute"])
def test_an_attention_backend_before_and_after_set_compute(first):
    packed, dequantized = both(lambda: CASES[FLUX].build(FLUX))
    expected = call(packed)
    try:
        if first == "backend":
            packed.set_attention_backend("_native_math")
        set_compute(packed, "exact")
        packed.set_attention_backend("_native_math")
        dequantized.set_attention_backend("_native_math")
        assert torch.equal(call(packed), call(dequantized))
        set_compute(packed, "int8")
        processors = [module.processor for module in packed.modules() if hasattr(module, "processor")]
        assert {processor._attention_backend.value for processor in processors} == {"_native_math"}
        assert not torch.equal(call(packed), expected)
        packed.reset_attention_backend()
        set_compute(packed, "exact")
    finally:
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    assert torch.equal(call(packed), expected)


STEP = {"timestep": 900}
CACHES: dict[str, Callable] = {
    "PAB": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: STEP["timestep"],
    ),
    "FasterCache": lambda: FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 800),
        unconditional_batch_skip_range=2, attention_weight_callback=lambda _: 0.5, is_guidance_distilled=True,
        current_timestep_callback=lambda: STEP["timestep"],
    ),
    "FirstBlockCache": lambda: FirstBlockCacheConfig(threshold=1.5),
    "TaylorSeer": lambda: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "MagCache": lambda: MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4, retention_ratio=0.1),
}  # fmt: skip


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_a_cache_does_what_it_does_on_the_dequantized_model(cache):
    deeper = Case(CASES[FLUX].inputs, CASES[FLUX].config | {"num_layers": 2, "num_single_layers": 2})
    outputs = []
    for model in both(lambda: deeper.build(FLUX)):
        plain = [call(model, factor=factor) for factor in (1, 1.1, 1.2, 1.3)]
        model.enable_cache(cache())
        cached = []
        for step, factor in enumerate((1, 1.1, 1.2, 1.3)):
            STEP["timestep"] = 900 - 200 * step
            with model.cache_context("one"):
                cached.append(call(model, factor=factor))
        assert not torch.equal(torch.stack(cached), torch.stack(plain))  # it does skip something
        model.disable_cache()
        assert torch.equal(call(model), plain[0])
        outputs.append(torch.stack(cached))
    assert torch.equal(*outputs)


def test_freeu(call_unet):
    packed, dequantized = both(tiny_unet)
    plain = call_unet(packed)
    for model in (packed, dequantized):
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    found = call_unet(packed)
    assert torch.equal(found, call_unet(dequantized))
    packed.disable_freeu()
    assert torch.equal(call_unet(packed), plain) and not torch.equal(found, plain)


# Offloading and casting.

# With parameters that are packed within modules of other classes: convolutions of three dimensions, experts.
OFFLOADED = ("WanTransformer3DModel", "NucleusMoEImageTransformer2DModel")


@pytest.mark.parametrize("name", OFFLOADED)
@pytest.mark.parametrize("kind", ["block_level", "leaf_level", "disk"])
def test_group_offloading_of_models_with_other_packed_parameters(name, kind, tmp_path):
    model = pack(CASES[name].build(name))
    expected = call(model, name)
    where = {"onload_device": CPU, "offload_device": CPU, "offload_type": "leaf_level"}
    if kind == "block_level":
        where |= {"offload_type": kind, "num_blocks_per_group": 1}
    if kind == "disk":
        where["offload_to_disk_path"] = str(tmp_path)
    model.enable_group_offload(**where)
    for _ in range(2):
        assert torch.equal(call(model, name), expected)


def rounded(model: nn.Module) -> nn.Module:
    """The model with floating parameters that fp8 holds."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float8_e4m3fn).to(parameter.dtype)
    return model


def test_layerwise_casting_leaves_codes_alone_and_takes_loras(call_unet, tmp_path):
    packed, expected = rounded(pack(tiny_unet())), rounded(pack(tiny_unet()))
    packed.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in packed.parameters())
    assert torch.equal(call_unet(packed), call_unet(expected))
    plain = call_unet(packed)
    # What is fused becomes a part of the layers, and is stored in fp8 as their biases are.
    lora = {
        name: half.to(torch.float8_e4m3fn).float() for name, half in tiny_lora(expected, ("to_q", "conv1")).items()
    }
    for model in (packed, expected):
        model.load_lora_adapter(lora, prefix=None)
    with_lora = call_unet(packed)
    assert torch.equal(with_lora, call_unet(expected)) and not torch.equal(with_lora, plain)
    for model in (packed, expected):
        model.fuse_lora()
    assert torch.equal(call_unet(packed), call_unet(expected))
    packed.save_pretrained(tmp_path)
    again = type(tiny_unet()).from_pretrained(tmp_path)
    assert torch.equal(call_unet(again), call_unet(expected))


# Compilers.


def test_blocks_compile_by_themselves_and_loras_of_several_ranks_are_swapped_without_another_compilation(tmp_path):
    torch._dynamo.reset()
    packed, dequantized = both(tiny_flux)
    pictures = []
    for model in (packed, dequantized):
        small, large = (tiny_lora(model, ("to_q", "to_v"), rank, rank) for rank in (2, 6))
        save_file(large, tmp_path / "pytorch_lora_weights.safetensors")
        model.enable_lora_hotswap(target_rank=6)
        model.load_lora_adapter(small, prefix=None, adapter_name="style")
        eager = call(copy.deepcopy(model))
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        torch.testing.assert_close(call(model), eager)
        with torch._dynamo.config.patch(error_on_recompile=True):
            model.load_lora_adapter(
                str(tmp_path), prefix=None, adapter_name="style", hotswap=True,
                weight_name="pytorch_lora_weights.safetensors",
            )  # fmt: skip
            pictures.append(call(model))
        assert not torch.allclose(pictures[-1], eager, rtol=1e-3)
    torch.testing.assert_close(*pictures)
    fresh = pack(tiny_flux())
    fresh.load_lora_adapter(large, prefix=None)
    torch.testing.assert_close(pictures[0], call(fresh), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_a_refused_hot_swap_from_a_file_keeps_the_adapter(call_unet, tmp_path):
    unet = pack(tiny_unet(), time_embedding="cache")
    unet.load_lora_adapter(tiny_lora(unet, ("to_q",)), prefix=None, adapter_name="style")
    before = call_unet(unet)
    lora = {f"mid_block.resnets.0.time_emb_proj.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    save_file(lora | tiny_lora(unet, ("to_q",)), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match='time_embedding="keep"'):
        unet.load_lora_adapter(
            str(tmp_path), prefix=None, adapter_name="style", hotswap=True, weight_name="lora.safetensors"
        )
    assert set(unet.peft_config) == {"style"} and torch.equal(call_unet(unet), before)


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_a_packed_model_is_exported(compute):
    name = "DiTTransformer2DModel"
    model = pack(CASES[name].build(name))
    set_compute(model, compute)
    expected, arguments = call(model, name), CASES[name].arguments()
    program = torch.export.export(model, (), arguments, strict=False)
    assert {tensor.dtype for tensor in program.state_dict.values()} >= {torch.uint8, torch.int32}
    with torch.no_grad():
        assert torch.equal(flat_output(program.module()(**arguments)), expected)


# LoRAs of Flux.


def flux_pipeline(transformer: nn.Module, kind: type = FluxPipeline) -> FluxPipeline:
    encoders = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2")}
    return kind(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, **encoders)


def call_flux(transformer: nn.Module) -> Tensor:
    torch.manual_seed(1)
    tokens = {"hidden_states": torch.randn(1, 16, 32)[..., : transformer.x_embedder.in_features]}
    texts = {"encoder_hidden_states": torch.randn(1, 5, 32), "pooled_projections": torch.randn(1, 16)}
    places = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    with torch.no_grad():
        numbers = {"timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5])}
        return transformer(**tokens, **texts, **places, **numbers).sample


def test_a_lora_through_a_flux_pipeline():
    outputs = []
    for transformer in both(tiny_flux):
        plain, pipe = call_flux(transformer), flux_pipeline(transformer)
        lora = {f"transformer.{name}": half for name, half in tiny_lora(transformer, ("to_q", "proj_mlp")).items()}
        pipe.load_lora_weights(lora)
        outputs.append(call_flux(transformer))
        pipe.unload_lora_weights()
        assert torch.equal(call_flux(transformer), plain) and not torch.equal(outputs[-1], plain)
    assert torch.equal(*outputs)


def test_a_control_lora_widens_the_first_layer_which_comes_back_packed(tmp_path):
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for transformer in both(tiny_flux):
        plain, pipe = call_flux(transformer), flux_pipeline(transformer, FluxControlPipeline)
        first, tensors = transformer.x_embedder, {k: v.clone() for k, v in transformer.state_dict().items()}
        lora = tiny_lora(transformer, ("to_q",))
        for half, shape in (("A", (4, 32)), ("B", (32, 4))):
            lora[f"x_embedder.lora_{half}.weight"] = torch.randn(shape, generator=generator.manual_seed(ord(half)))
        lora |= {"transformer_blocks.0.attn.norm_q.weight": torch.full((16,), 1.5)}
        pipe.load_lora_weights({f"transformer.{name}": value for name, value in lora.items()})
        assert transformer.x_embedder.in_features == 32
        outputs.append(call_flux(transformer))
        if transformer is not pipe.transformer or getattr(transformer, "is_quantized", False):
            with pytest.raises(
                ValueError, match=r"Control LoRA has replaced x_embedder .*reset_to_overwritten_params"
            ):
                transformer.save_pretrained(tmp_path / "expanded")
        pipe.unload_lora_weights(reset_to_overwritten_params=True)
        assert torch.equal(call_flux(transformer), plain)
        assert {name: value.shape for name, value in transformer.state_dict().items()} == {
            name: value.shape for name, value in tensors.items()
        }
        if getattr(transformer, "is_quantized", False):
            assert transformer.x_embedder is first and "x_embedder" in all_packed_layers(transformer)
            transformer.save_pretrained(tmp_path / "again")
            assert torch.equal(call_flux(type(tiny_flux()).from_pretrained(tmp_path / "again")), plain)
    assert torch.equal(*outputs)
