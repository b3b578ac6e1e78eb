"""LoRAs for tests on packed models, and what they are compared by."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from tiny import tiny_lora
from torch import Tensor, nn

TARGETS = {
    "linear": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2"),
    "conv": ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "proj_in"),
}
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # relative to the output's norm

every_kind = pytest.mark.parametrize("kind", TARGETS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def make_lora(model: nn.Module, kind: str, rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Return a LoRA of random weights on a model's Linear or Conv2d layers, as its file has it."""
    return tiny_lora(model, TARGETS[kind], rank, seed)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fail where the norm of the difference, relative to that of `expected`, is above `tolerance`."""
    assert found.dtype == expected.dtype
    error = (found - expected).float().norm() / expected.float().norm()
    assert error <= tolerance


def layers(model: nn.Module, kind: type) -> list:
    """Return the modules of a class."""
    return [module for module in model.modules() if isinstance(module, kind)]


def train_config(**changes) -> LoraConfig:
    modules = r".*(to_q|to_k|to_v|to_out\.0|conv1|conv2|proj_in)"
    return LoraConfig(**({"r": 4, "lora_alpha": 4, "target_modules": modules} | changes))


def with_trainable_adapter(models, config=None):
    for model in models:
        torch.manual_seed(5)
        model.add_adapter(config or train_config())
        generator = torch.Generator().manual_seed(6)
        for layer in layers(model, LoraLayer):  # PEFT starts at zero, where half of the gradients are zero
            up = layer.lora_B["default"].weight
            up.data = 0.1 * torch.randn(up.shape, generator=generator)
        model.train()
    return models
