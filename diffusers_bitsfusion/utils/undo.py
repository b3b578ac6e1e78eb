"""Changes of models that are undone when they fail or are interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn


@contextmanager
def unchanged_on_error(*models: nn.Module) -> Iterator[None]:
    """Put models back as they were if the block ends by an exception, an interruption by the keyboard included.

    Modules, parameters, dtypes, hooks, attributes and the config of a transformers model are put back. Within the
    block, parameters of one dimension (norms, biases) may be written in place; others may only be replaced, or given
    other data, since a copy of them would double the memory.

    Args:
        *models: models that the block changes.
    """
    states = [_ModuleState(module) for model in models for module in model.modules()]
    parameters = [_ParameterState(parameter) for model in models for parameter in model.parameters()]
    configs = [(config, dict(vars(config))) for model in models if (config := vars(model).get("config")) is not None]
    try:
        yield
    except BaseException:
        for state in states:
            state.restore()
        for parameter in parameters:
            parameter.restore()
        for config, attributes in configs:
            _refill(vars(config), attributes)
        raise


class _ModuleState:
    """Class and attributes of a module, and the content of those that are dicts: parts, buffers, hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._class = module, type(module)
        self._attributes = dict(vars(module))
        self._contents = [
            (value, dict(value))
            for value in vars(module).values()
            if isinstance(value, dict) and not isinstance(value, FrozenDict)
        ]

    def restore(self) -> None:
        self._module.__class__ = self._class
        _refill(vars(self._module), self._attributes)
        for value, content in self._contents:
            _refill(value, content)


@dataclass
class _ParameterState:
    """Data of a parameter, and a copy of it where it has one dimension."""

    parameter: nn.Parameter

    def __post_init__(self) -> None:
        self._data: Tensor = self.parameter.data
        self._copy = self._data.clone() if self._data.dim() < 2 else None
        self._requires_grad = self.parameter.requires_grad

    @torch.no_grad()
    def restore(self) -> None:
        self.parameter.data = self._data
        self.parameter.requires_grad_(self._requires_grad)
        if self._copy is not None:
            self._data.copy_(self._copy)


def _refill(target: dict[str, Any], content: dict[str, Any]) -> None:
    target.clear()
    target.update(content)
