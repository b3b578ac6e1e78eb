"""AdamW as in the paper (section 6): constant learning rate, weight decay on weights alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters that require gradients: weights with `weight_decay`; scales, biases and norms without.

    The decay of a scale would pull all weights of its channel towards zero.
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
    """Return AdamW over the parameters of `model` that require gradients.

    Args:
        model: model to train.
        learning_rate: learning rate.
        betas: decay rates of the first and second moments.
        weight_decay: weight decay of weights; scales, biases and norms have none.
        epsilon: number that is added to the root of the second moment.
        use_8bit_adam: whether the moments are in 8 bits, by bitsandbytes.

    Raises:
        ImportError: `use_8bit_adam` is set, and bitsandbytes is not installed.
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
    groups = parameter_groups(model, weight_decay)
    optimizer: torch.optim.Optimizer = kind(groups, lr=learning_rate, betas=betas, eps=epsilon)
    return optimizer
