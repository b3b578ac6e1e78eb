"""AdamW as the paper uses it: constant learning rate, weight decay on weights alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that require gradients: weights with `weight_decay`; scales, biases and norms without.

    A scale that decays would pull a whole channel towards zero, weights and all.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module,
    learning_rate: float = 1e-5,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-2,
    epsilon: float = 1e-8,
    use_8bit_adam: bool = False,
) -> torch.optim.Optimizer:
    """AdamW over what `model` trains.

    Raises:
        ImportError: `use_8bit_adam` without bitsandbytes.
    """
    kind: Any = torch.optim.AdamW
    if use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ImportError(
                "To use 8-bit Adam, please install the bitsandbytes library: `pip install bitsandbytes`"
            ) from error
        kind = bitsandbytes.optim.AdamW8bit
    return kind(parameter_groups(model, weight_decay), lr=learning_rate, betas=betas, eps=epsilon)
