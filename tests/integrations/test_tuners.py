"""PEFT's tuners on packed layers, against the same on the dequantized model; refusals that leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import (
    LNTuningConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import tiny_lora, tiny_unet
from torch import Tensor, nn
from tuner_cases import TUNERS, adapted, close, dequantized, images, packed_net

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.nn.conversion import pack_weight, packed_from_float

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of PEFT, about what its tuners cannot do
]

every_tuner = pytest.mark.parametrize("tuner", TUNERS)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    output = model(images())
    (output - 1).square().mean().backward()
    optimizer.step()
    return output.detach()


@every_tuner
def test_outputs_and_gradients_are_those_on_the_dequantized_model(tuner):
    net = packed_net()
    models = adapted(net, tuner), adapted(dequantized(packed_net()), tuner)
    outputs = []
    for model in models:
        outputs.append(model(images()))
        outputs[-1].square().sum().backward()
    close(*outputs)
    found, expected = (
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in models
    )
    assert found.keys() == expected.keys() and found
    for name, gradient in found.items():
        close(gradient, expected[name], 2e-5)


@pytest.mark.parametrize("tuner", [name for name in TUNERS if name != "PiSSA, fast"])  # whose start is random
def test_a_trained_adapter_is_saved_and_comes_back(tuner, tmp_path):
    model = adapted(packed_net(), tuner)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    outputs = [training_step(model, optimizer) for _ in range(2)]
    assert not torch.equal(*outputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(packed_net(), tmp_path)
    close(again(images()), model.eval()(images()), 1e-5)


def test_a_base_weight_is_truncated_where_the_adapter_has_no_memory_yet(tmp_path):
    model = adapted(packed_net(), "KaSA").eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(packed_net(), tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in again.parameters())
    close(again(images()), model(images()), 1e-5)


def test_targets_that_are_not_given_are_those_of_the_architecture():
    net = packed_net()
    model = nn.ModuleDict({"q": net.first, "v": net.second, "conv": net.conv})
    model.config = {"model_type": "t5"}
    get_peft_model(model, LoraConfig(r=2))
    assert {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)} == {"q", "v"}


# What cannot be trained.


@pytest.mark.parametrize("target", ["conv", "pointwise", "second"])
def test_modules_to_save_of_a_packed_layer_says_what_to_do(target):
    net = packed_net()
    before = net(images())
    config = LoraConfig(r=2, target_modules=["first"], modules_to_save=[target])
    with pytest.raises(ValueError, match=f"modules_to_save names {target}.*target_modules.*prepare_qat"):
        get_peft_model(net, config)
    assert not any(isinstance(module, BaseTunerLayer) for module in net.modules())
    assert torch.equal(net(images()), before)


def test_a_packed_target_of_lntuning_says_what_to_do(packed_unet, call_unet):
    before = call_unet(packed_unet)
    with pytest.raises(ValueError, match=r"target_modules names .*to_q, whose weights are packed: LNTuning .* norms"):
        get_peft_model(packed_unet, LNTuningConfig(target_modules=["norm1", "to_q"]))
    assert torch.equal(call_unet(packed_unet), before)
    tuned = get_peft_model(packed_unet, LNTuningConfig(target_modules=["norm1"]))
    assert torch.equal(call_unet(tuned), before)


def test_modules_to_save_of_a_unet_s_block_says_what_to_do(packed_unet, call_unet):
    before = call_unet(packed_unet)
    with pytest.raises(ValueError, match="modules_to_save names mid_block"):
        packed_unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["mid_block"]))
    assert torch.equal(call_unet(packed_unet), before)


def test_a_tuner_without_modules_to_save_is_put_into_a_packed_model():
    model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 8))
    layer = packed_from_float(model[1], 8, torch.float32)
    pack_weight(layer, model[1].weight.detach(), Rounding())
    model[1] = layer
    tokens = torch.tensor([[1, 2, 5]])
    before = model(tokens)
    tuned = get_peft_model(model, TrainableTokensConfig(target_modules=["0"], token_indices=[2]))
    assert torch.equal(tuned(tokens), before)


def test_training_a_packed_model_whole_says_what_to_do(packed_unet):
    trainable = {name for name, p in packed_unet.named_parameters() if p.requires_grad}
    for module in (packed_unet, packed_unet.conv_in):
        with pytest.raises(RuntimeError, match=r"floating point.*add_adapter.*prepare_qat"):
            module.requires_grad_(True)
    assert {name for name, p in packed_unet.named_parameters() if p.requires_grad} == trainable
    packed_unet.requires_grad_(False)
    assert not any(p.requires_grad for p in packed_unet.parameters())


# Refusals on models of Stable Diffusion.


@pytest.fixture
def cached():
    """Without the time embedding that a table has beside its features."""
    return quantize_model(tiny_unet(), BitsFusionConfig(recipe=2, time_embedding="cache"), progress=False)


def lcm_lora(unet) -> dict[str, Tensor]:
    """As diffusers' script for LCM trains it: projections of the time embedding among others."""
    lora = tiny_lora(unet, ("to_q", "conv1"), rank=4)
    width = 4 * unet.config.block_out_channels[0]
    for name, module in unet.named_modules():
        if name.endswith("time_emb_proj"):
            size = module.stop - module.start
            lora |= {f"{name}.lora_A.weight": torch.ones(4, width), f"{name}.lora_B.weight": torch.ones(size, 4)}
    return lora


def untouched(unet, modules) -> bool:
    same = [(name, type(module)) for name, module in unet.named_modules()] == modules
    return same and not any(p.is_meta for p in unet.parameters()) and not getattr(unet, "peft_config", {})


LOADS = {
    "load_lora_adapter": lambda unet, lora: unet.load_lora_adapter(lora, prefix=None),
    "eagerly": lambda unet, lora: unet.load_lora_adapter(lora, prefix=None, low_cpu_mem_usage=False),
    "with a prefix": lambda unet, lora: unet.load_lora_adapter(
        {f"unet.{k}": v for k, v in lora.items()}, prefix="unet"
    ),
    "add_adapter": lambda unet, lora: unet.add_adapter(LoraConfig(target_modules=["to_q", "time_emb_proj"])),
    "DoRA": lambda unet, lora: unet.add_adapter(LoraConfig(target_modules=["to_q", "time_emb_proj"], use_dora=True)),
    "LoKr": lambda unet, lora: unet.add_adapter(LoKrConfig(target_modules=["to_q", "time_emb_proj"])),
    "get_peft_model": lambda unet, lora: get_peft_model(unet, LoraConfig(target_modules=["to_q", "time_emb_proj"])),
    "time_embedding": lambda unet, lora: unet.load_lora_adapter(
        tiny_lora(unet, ("to_q",), 2)
        | {f"time_embedding.linear_1.lora_{k}.weight": torch.ones(s) for k, s in (("A", (2, 32)), ("B", (128, 2)))},
        prefix=None,
    ),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_an_adapter_of_the_time_embedding_is_refused_and_leaves_nothing(cached, call_unet, load):
    before, modules = call_unet(cached), [(name, type(module)) for name, module in cached.named_modules()]
    for _ in range(2):
        with pytest.raises(ValueError, match=r'LoRA cannot adapt .*time_emb.*time_embedding="keep"'):
            load(cached, lcm_lora(cached))
        assert untouched(cached, modules)
        assert torch.equal(call_unet(cached), before)
    cached.load_lora_adapter(tiny_lora(cached, ("to_q",), 4), prefix=None)
    assert not torch.equal(call_unet(cached), before)


def test_a_hot_swap_with_the_time_embedding_is_refused_and_keeps_what_was_there(cached, call_unet):
    cached.load_lora_adapter(tiny_lora(cached, ("to_q", "conv1"), 4), prefix=None, adapter_name="style")
    before = call_unet(cached)
    with pytest.raises(ValueError, match='time_embedding="keep"'):
        cached.load_lora_adapter(lcm_lora(cached), prefix=None, adapter_name="style", hotswap=True)
    with pytest.raises(ValueError, match='time_embedding="keep"'):
        cached.load_lora_adapter(lcm_lora(cached), prefix=None, adapter_name="other")
    assert torch.equal(call_unet(cached), before)
    assert set(cached.peft_config) == {"style"}


def test_a_pipeline_that_refuses_a_lora_samples_as_before(packed_folders):
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["cache"])
    pipe.set_progress_bar_config(disable=True)

    def sample_latents() -> Tensor:
        return pipe(
            "ab", num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(2)
        ).images

    before = sample_latents()
    with pytest.raises(ValueError, match='time_embedding="keep"'):
        pipe.load_lora_weights({f"unet.{name}": half for name, half in lcm_lora(pipe.unet).items()})
    assert pipe.get_active_adapters() == []
    assert torch.equal(sample_latents(), before)


@pytest.mark.parametrize("loaded", [False, True])
def test_an_adapter_refused_half_way_leaves_nothing(cached, call_unet, loaded):
    if loaded:
        cached.load_lora_adapter(tiny_lora(cached, ("to_q", "to_k"), 4), prefix=None, adapter_name="style")
    before, modules = call_unet(cached), [(name, type(module)) for name, module in cached.named_modules()]
    parameters = {name: p.requires_grad for name, p in cached.named_parameters()}
    config = LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights="corda")
    with pytest.raises(ValueError, match="changes the base weight"):
        cached.add_adapter(config, adapter_name="second")
    assert [(name, type(module)) for name, module in cached.named_modules()] == modules
    assert {name: p.requires_grad for name, p in cached.named_parameters()} == parameters
    assert set(getattr(cached, "peft_config", ())) == ({"style"} if loaded else set())
    assert torch.equal(call_unet(cached), before)
    cached.add_adapter(LoraConfig(target_modules=["to_q"]), adapter_name="second")


def test_a_start_that_changes_the_base_weight_leaves_nothing_when_it_is_refused(cached, call_unet):
    before = call_unet(cached)
    with pytest.raises(ValueError, match="pissa"):
        cached.add_adapter(LoraConfig(target_modules=["to_q", "conv_out"], init_lora_weights="pissa"))
    assert torch.equal(call_unet(cached), before)


def test_no_component_of_a_pipeline_is_fused_when_one_cannot_be(source_folder):
    config = BitsFusionConfig(recipe=4, time_embedding="keep", components=["unet", "text_encoder"])
    pipe = StableDiffusionPipeline.from_pretrained(source_folder, quantization_config=config)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="a")
    pipe.text_encoder.add_adapter(OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"]), adapter_name="a")
    with pytest.raises(ValueError, match="is no addition of low rank"):
        pipe.fuse_lora(components=["unet", "text_encoder"])
    for model in (pipe.unet, pipe.text_encoder):
        assert not any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer))
    pipe.fuse_lora(components=["unet"])
    assert any(module.merged for module in pipe.unet.modules() if isinstance(module, BaseTunerLayer))
