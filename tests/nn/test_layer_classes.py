"""Layers that are more than `nn.Linear` and `nn.Conv2d`: they keep their class and forward, or their shared weight."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.lora import LoRACompatibleLinear
from tiny import tiny_unet
from torch import nn

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.nn import PackedWeight
from diffusers_bitsfusion.packing.planning import quantizable_layers
from diffusers_bitsfusion.packing.tensors import packable_tensors

pytestmark = pytest.mark.usefixtures("one_thread")


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Causal(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(nn.functional.pad(input, (2, 0)), weight, bias)


class Renamed(nn.Linear):
    """Adds nothing."""


def hooked():
    layer = nn.Linear(10, 6)
    layer.register_forward_pre_hook(lambda module, inputs: None)
    return layer


def patched():
    layer = nn.Linear(10, 6)
    layer.forward = lambda input: input
    return layer


@pytest.mark.parametrize(
    ("make", "packed"),
    [
        (lambda: nn.Linear(10, 6), None),
        (lambda: Renamed(10, 6), None),
        (lambda: nn.Conv2d(4, 6, 3), None),
        (lambda: Scaled(10, 6), "packed_weight"),
        (lambda: Causal(4, 6, 3), "packed_weight"),
        (patched, "packed_weight"),
        (lambda: LoRACompatibleLinear(10, 6), "packed_weight"),
        (hooked, "packed_weight"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(10, 6)), "parametrizations.weight.packed_original1"),
    ],
)
@pytest.mark.filterwarnings("ignore:Use of `LoRACompatible:FutureWarning")
def test_a_layer_that_is_more_than_linear_keeps_its_class(make, packed):
    assert set(packable_tensors(nn.Sequential(make()))) == ({f"0.{packed}"} if packed else set())
    assert set(quantizable_layers(nn.Sequential(make()))) == (set() if packed else {"0"})


def test_quantizing_leaves_the_forward_of_such_layers():
    unet = tiny_unet()
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn1.to_q.__class__ = Scaled
    quantize_model(unet, BitsFusionConfig(recipe=2, time_embedding="keep"), progress=False)
    query = block.attn1.to_q
    x = torch.randn(2, query.in_features)
    assert isinstance(query, Scaled) and not isinstance(query, PackedWeight)
    assert torch.equal(query(x), Scaled.forward(query, x)) and query.weight[0].unique().numel() <= 5
    assert isinstance(block.attn1.to_k, PackedWeight)


def test_layers_that_share_a_weight_are_each_packed(call_unet, tmp_path):
    unet = tiny_unet()
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.to_k.weight = attention.to_q.weight
    quantize_model(unet, BitsFusionConfig(recipe=8, time_embedding="keep"), progress=False)
    assert torch.equal(attention.to_k.weight, attention.to_q.weight)
    unet.save_pretrained(tmp_path)
    assert torch.equal(call_unet(type(unet).from_pretrained(tmp_path)), call_unet(unet))
