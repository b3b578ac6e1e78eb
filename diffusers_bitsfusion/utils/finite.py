"""Values that are not finite are refused before a model is changed."""

from __future__ import annotations

import torch
from torch import nn


def refuse_not_finite(model: nn.Module, action: str) -> None:
    """Refuse a model of which a parameter holds NaN or infinite values.

    Args:
        model: model; parameters on the meta device and those in 8 bits, which only store, are not looked at.
        action: verb of the requested action, for the message.

    Raises:
        ValueError: a parameter holds such values; the message names the first one.
    """
    for name, parameter in model.named_parameters():
        computes = parameter.is_floating_point() and parameter.itemsize > 1 and not parameter.is_meta
        if computes and not torch.isfinite(parameter).all():
            raise ValueError(f"Cannot {action}: {name} holds NaN or infinite values.")
