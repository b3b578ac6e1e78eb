"""A tiny model of a class of diffusers: its configuration and the inputs of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn


def random(*shape: int) -> Tensor:
    """Normal values, the next ones of torch's generator."""
    return torch.randn(*shape)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


def time(value: float = 500.0) -> Tensor:
    return torch.tensor([value])


def long(*values: int) -> Tensor:
    return torch.tensor([values])


@dataclass(frozen=True)
class Case:
    """How to build and call a tiny model of a class.

    Attributes:
        inputs: makes the arguments of a call, by name.
        config: arguments of the constructor.
        call: runs the model with the arguments, where its parts are called by another model.
        kernel_error: relative difference from the dequantized model's outputs that is allowed, where layers are so
            wide that the packed ones take other kernels; 0 for none.
    """

    inputs: Callable[[], dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    call: Callable[..., Any] = nn.Module.__call__
    kernel_error: float = 0.0

    def build(self, name: str) -> nn.Module:
        """Return the model of class `name` with random weights.

        None is zero, which would hide what is behind it, and none is left as the memory was that torch found for it.
        """
        torch.manual_seed(0)
        model = getattr(diffusers, name)(**self.config).eval()
        for parameter in model.parameters():
            is_experts = parameter.dim() == 3 and parameter.shape[0] > 1
            if parameter.is_floating_point() and (is_experts or not parameter.detach().any()):
                nn.init.normal_(parameter, std=0.1)
        return model.requires_grad_(False)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a call, the same each time."""
        torch.manual_seed(1)
        return self.inputs()


def flat_output(output: Any) -> Tensor:
    """Return all floating tensors in what a model returns, in one row."""
    return torch.cat([part.flatten().float() for part in tensors(output)])


def tensors(output: Any) -> list[Tensor]:
    """Return all floating tensors in arguments or outputs, within lists and dicts, too."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in tensors(part)]
    if hasattr(output, "mean") and hasattr(output, "logvar"):  # a distribution of latents
        return [output.mean]
    return []
