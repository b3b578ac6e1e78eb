"""Small nets of packed layers, and PEFT's tuners for them."""

from __future__ import annotations

import copy

import peft
import torch
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig
from torch import Tensor, nn

from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.nn import PackedWeight
from diffusers_bitsfusion.nn.conversion import float_from_packed, pack_weight, packed_from_float, replace_module

LINEAR = ["first", "second"]
ALL = [*LINEAR, "conv", "pointwise"]


class Net(nn.Module):
    """Convolutions, then linear layers; one of them without a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Conv2d(3, 16, 3, padding=1)
        self.conv, self.pointwise = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(self.conv(torch.tanh(self.head(x)))).mean((2, 3))
        return self.second(torch.tanh(self.first(x)))


def packed_net() -> Net:
    net = Net()
    for name, layer in list(net.named_modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            packed = packed_from_float(layer, 4, torch.float32)
            pack_weight(packed, layer.weight, Rounding(iterations=3))
            replace_module(net, name, packed)
    return net


def dequantized(net: Net) -> Net:
    dequantized = copy.deepcopy(net)
    for name, layer in list(dequantized.named_modules()):
        if isinstance(layer, PackedWeight):
            replace_module(dequantized, name, float_from_packed(layer))
    return dequantized


TUNERS = {
    "LoRA": lambda: LoraConfig(r=2, target_modules=ALL, init_lora_weights=False),
    "rsLoRA": lambda: LoraConfig(r=2, lora_alpha=3, target_modules=ALL, init_lora_weights=False, use_rslora=True),
    "DoRA": lambda: LoraConfig(r=2, target_modules=ALL, init_lora_weights=False, use_dora=True),
    "PiSSA": lambda: LoraConfig(r=2, target_modules=LINEAR, init_lora_weights="pissa"),
    "PiSSA, fast": lambda: LoraConfig(r=2, target_modules=LINEAR, init_lora_weights="pissa_niter_8"),
    "OLoRA": lambda: LoraConfig(r=2, target_modules=LINEAR, init_lora_weights="olora"),
    "OLoRA in capitals": lambda: LoraConfig(r=2, target_modules=LINEAR, init_lora_weights="OLoRA"),
    "orthogonal": lambda: LoraConfig(r=2, target_modules=LINEAR, init_lora_weights="orthogonal"),
    "KaSA": lambda: LoraConfig(r=2, target_modules=LINEAR, kasa_config=peft.KasaConfig(), init_lora_weights=False),
    "MiCA": lambda: LoraConfig(r=2, target_modules=LINEAR, init_lora_weights="mica"),
    "MonteCLoRA": lambda: LoraConfig(
        r=2, target_modules=LINEAR, init_lora_weights=False, monteclora_config=peft.MontecloraConfig()
    ),
    "VeLoRA": lambda: LoraConfig(
        r=2, target_modules=LINEAR, init_lora_weights=False, velora_config=peft.VeloraConfig(num_groups=4)
    ),
    "BD-LoRA": lambda: LoraConfig(
        r=4,
        target_modules=LINEAR,
        init_lora_weights=False,
        use_bdlora=BdLoraConfig(target_modules_bd_a=["first"], target_modules_bd_b=["second"], nblocks=2),
    ),
    "LoRA, bias": lambda: LoraConfig(r=2, target_modules=["first", "conv"], init_lora_weights=False, lora_bias=True),
    "BEFT": lambda: peft.BeftConfig(target_modules=["first"], init_weights=False),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, target_modules=LINEAR, init_lora_weights=False
    ),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=LINEAR, init_weights=False),
    "RandLora": lambda: peft.RandLoraConfig(r=2, target_modules=LINEAR, init_weights=False),
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, target_modules=LINEAR),
    "GraLoRA": lambda: peft.GraloraConfig(r=2, gralora_k=2, target_modules=LINEAR, init_weights=False),
    "DeLoRA": lambda: peft.DeloraConfig(r=2, target_modules=LINEAR, init_weights=False),
    "UniLoRA": lambda: peft.UniLoraConfig(r=2, target_modules=LINEAR),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=10, target_modules=LINEAR, init_weights=False),
    "LoKr of two factors": lambda: LoKrConfig(
        r=1, target_modules=ALL, init_weights=False, decompose_both=True, decompose_factor=2
    ),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=ALL, init_weights=False, use_effective_conv2d=True),
    "LoKr": lambda: LoKrConfig(r=2, target_modules=ALL, init_weights=False),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=10, target_modules=LINEAR, init_weights=False),
    "C3A": lambda: peft.C3AConfig(block_size=4, target_modules=LINEAR, init_weights=False),
    "OFT": lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=ALL, init_weights=False),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=2, target_modules=ALL, init_weights=False),
    "IA3": lambda: peft.IA3Config(
        target_modules=ALL, feedforward_modules=["second", "pointwise"], init_ia3_weights=False
    ),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=ALL, init_weights=False),
    "GLoRA": lambda: peft.GloraConfig(r=2, target_modules=LINEAR, init_weights=False),
    "OSF": lambda: peft.OSFConfig(effective_rank=4, init_weights=False),  # by itself it targets all that is linear
}
# Outputs in training depend on chance.
RANDOM = {"PVeRA": lambda: peft.PveraConfig(r=4, target_modules=LINEAR, init_weights=False)}
# Those that add a matrix, of low rank or of few rows, or to the bias.
MERGED = {*RANDOM, *list(TUNERS)[: list(TUNERS).index("OFT")]}


def adapted(net: nn.Module, tuner: str) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(net, (TUNERS | RANDOM)[tuner]())


def images() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(2))


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-12
