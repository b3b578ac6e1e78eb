"""What tests of several rooms ask of a model."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from tiny import tiny_unet
from torch import Tensor, nn

from diffusers_bitsfusion.nn import PackedWeight


def smooth_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """Return a tiny UNet whose time features change slowly along the time, as a trained model's do."""
    unet = tiny_unet(seed, **changes)
    with torch.no_grad():
        cosines, sines = unet.time_embedding.linear_1.weight.chunk(2, dim=1)
        for waves in (cosines, sines):
            waves[:, : waves.shape[1] // 2] = 0  # those of the shortest periods
    return unet


def packed_layers(model: nn.Module) -> dict[str, PackedWeight]:
    """Return the packed layers of a model by name, which may be none."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


def all_packed_layers(model: nn.Module) -> dict[str, PackedWeight]:
    """Return the packed layers of a model by name, and fail where there are none: a loop over them would be empty."""
    layers = packed_layers(model)
    assert layers, f"This {type(model).__name__} has no packed layer."
    return layers


def attentions(model: nn.Module) -> list[Attention]:
    """Return the attention modules of a model, of diffusers' class or of a subclass."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def layer_sizes(model: nn.Module) -> dict[str, int]:
    """Return the number of weights of every Linear and Conv2d layer by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert layers, f"This {type(model).__name__} has no layer."
    return {name: layer.weight.numel() for name, layer in layers.items()}


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Let every write beyond a size of a file fail within the block, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    tensors, expected = one.state_dict(), other.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference as a share of the norm of `expected`, computed in double precision."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())
