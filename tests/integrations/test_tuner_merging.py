"""Merging adapters of PEFT into packed layers, unloading them, and refusals before anything changes."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from peft import LoKrConfig, LoraConfig, PeftMixedModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tuner_cases import LINEAR, MERGED, RANDOM, TUNERS, adapted, close, dequantized, images, packed_net

from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.integrations.peft_folding import low_rank_factors
from diffusers_bitsfusion.nn.conversion import pack_weight, packed_from_float

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of PEFT, about what its tuners cannot do
]

every_tuner = pytest.mark.parametrize("tuner", [*TUNERS, *RANDOM])


@every_tuner
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_right_or_refused_by_name_before_anything_changes(tuner, merge):
    net = packed_net()
    model = adapted(net, tuner).eval()
    before = model(images())
    if tuner in MERGED:
        getattr(model, merge)(safe_merge=True)
        close(net(images()), before)
        if merge == "merge_adapter":
            model.unmerge_adapter()
            close(model(images()), before)
        return
    names = {name for name, _ in model.named_modules()}
    with pytest.raises(ValueError, match=r"The adapter 'default' .*dequantize\(\)"):
        getattr(model, merge)()
    assert {name for name, _ in model.named_modules()} == names
    assert not any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer))
    assert torch.equal(model(images()), before)


def test_a_layer_merged_by_itself_is_refused_too():
    model = adapted(packed_net(), "OFT")
    before = model(images())
    with pytest.raises(RuntimeError, match=r"fuse_lora\(\).*dequantize\(\)"):
        model.base_model.model.conv.merge()
    assert torch.equal(model(images()), before)


def test_merging_names_the_tuner_and_the_layer():
    with pytest.raises(ValueError, match=r"The adapter 'default' on conv \(oft\) .* no addition"):
        adapted(packed_net(), "OFT").merge_adapter()


def test_what_has_no_low_rank_or_no_bias_to_add_to_is_refused_with_the_reason():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(160, 150))
    wide[0] = pack_weight(packed_from_float(wide[0], 4, torch.float32), wide[0].weight, Rounding(iterations=1))
    with pytest.raises(ValueError, match="no low rank"):
        get_peft_model(wide, LoKrConfig(r=99, target_modules=["0"], init_weights=False)).merge_adapter()
    for config in (peft.BeftConfig(target_modules=LINEAR), LoraConfig(target_modules=["second"], lora_bias=True)):
        with pytest.raises(ValueError, match=r"The adapter 'default' .*the layer has none"):
            get_peft_model(packed_net(), config).merge_adapter()


@pytest.mark.parametrize("tuner", ["LoHa", "VeRA"])
def test_a_model_whose_layers_may_merge_is_copied_and_pickled(tuner):
    model = adapted(packed_net(), tuner).eval()
    before = model(images())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(images()), before)
        again.merge_adapter()
        close(again(images()), before)
    assert torch.equal(model(images()), before)


def test_adapters_of_half_precision_are_factored_to_their_precision():
    torch.manual_seed(0)
    up, down = torch.randn(40, 3), torch.randn(3, 5, 3, 3)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        delta = torch.einsum("or,rihw->oihw", up, down).to(dtype)
        found_down, found_up = low_rank_factors(delta)
        assert found_down.shape == (3, 5, 3, 3) and found_up.shape == (40, 3, 1, 1)
        close(torch.einsum("or,rihw->oihw", found_up[:, :, 0, 0], found_down), delta.float(), tolerance)
    assert low_rank_factors(torch.randn(150, 160)) is None
    few = torch.randn(4, 90)
    found_down, found_up = low_rank_factors(few)
    close(found_up @ found_down, few)
    assert low_rank_factors(torch.zeros(40, 45))[0].shape == (0, 45)


def test_a_lora_beside_another_adapter_is_merged_when_it_is_named():
    net = packed_net()
    model = PeftMixedModel(net, TUNERS["LoRA"](), adapter_name="lora")
    model.add_adapter("oft", peft.OFTConfig(r=0, oft_block_size=3, target_modules=["head"]))
    model.set_adapter(["lora"])
    before = model(images())
    with pytest.raises(ValueError, match=r"'oft' on head \(oft\)"):
        model.base_model.merge_adapter(["lora", "oft"])
    assert torch.equal(model(images()), before)
    model.base_model.merge_adapter(["lora"])
    close(model(images()), before)


def test_a_mixed_model_refuses_to_merge_what_is_no_lora():
    model = PeftMixedModel(packed_net(), TUNERS["LoRA"](), adapter_name="lora")
    model.add_adapter("oft", peft.OFTConfig(r=0, oft_block_size=3, target_modules=["head"]))
    model.set_adapter(["lora", "oft"])
    before = model(images())
    with pytest.raises(ValueError, match=r"'oft' on head \(oft\)"):
        model.merge_and_unload()
    assert torch.equal(model(images()), before)


@pytest.mark.parametrize("tuner", ["LoRA", "DoRA", "LoHa", "OFT", "VeRA", "GLoRA", "OSF"])
def test_unloading_an_adapter_leaves_the_packed_layers(tuner):
    net = packed_net()
    before, kinds = net(images()), {name: type(module) for name, module in net.named_modules()}
    assert adapted(net, tuner).unload() is net
    assert {name: type(module) for name, module in net.named_modules()} == kinds
    assert torch.equal(net(images()), before)


def test_a_mixed_model_of_loras_is_merged_and_one_of_others_unloaded():
    net = packed_net()
    model = PeftMixedModel(net, TUNERS["LoRA"](), adapter_name="a")
    model.add_adapter("b", TUNERS["rsLoRA"]())
    model.set_adapter(["a", "b"])
    before = model(images())
    close(model.merge_and_unload()(images()), before)
    net = packed_net()
    before = net(images())
    assert torch.equal(PeftMixedModel(net, TUNERS["LoKr"]()).unload()(images()), before)


def test_another_layer_s_weight_is_not_taken_for_a_layer_s_own():
    net = packed_net()
    with pytest.raises(RuntimeError, match="neither be written"):
        net.first.weight = packed_net().first.weight


def test_what_is_not_packed_is_merged_as_ever():
    net = dequantized(packed_net())
    model = adapted(net, "LoKr").eval()
    before = model(images())
    model.merge_and_unload()
    close(net(images()), before, 1e-5)


def test_values_that_are_not_finite_are_refused_before_any_layer_is_merged():
    model = adapted(packed_net(), "LoRA")
    model.base_model.model.second.lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert not any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer))
