"""GLoRA on packed layers, which PEFT accepts `nn.Linear` alone for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft.tuners.glora.layer import GloraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..nn import BitsFusionLinear


def wrap_create_glora(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wrap `GloraModel._create_new_module` of PEFT, which refuses classes that extend `nn.Linear`."""

    @functools.wraps(original)
    def create_new_module(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, BitsFusionLinear):
            return original(config, adapter_name, target, **kwargs)
        layer: nn.Module = GloraLinear(target, adapter_name, config=config)
        return layer

    return create_new_module
