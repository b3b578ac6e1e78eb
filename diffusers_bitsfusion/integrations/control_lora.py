"""LoRAs of Flux on packed transformers: Control LoRAs replace packed layers by wider ones, in floating point."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..nn.compute import packed_layers
from ..utils.private_names import DIFFUSERS_OVERWRITTEN

# Attribute of a transformer with the packed layers that have been replaced, by name.
_REPLACED = "_packed_before_expansion"


class _WithWeights:
    """A packed model whose state dict has the weights of its packed layers, as lazy tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's tensors, and the weight of each packed layer."""
        weights = {f"{name}.weight": layer.weight for name, layer in packed_layers(self._model).items()}
        return {**self._model.state_dict(), **weights}


def wrap_fit_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what widens a Flux LoRA to the size of its layers, which looks for their weights in the state dict."""

    @functools.wraps(original)
    def fit_lora(cls: type, transformer: Any, lora_state_dict: dict[str, Tensor]) -> Any:
        is_packed = bool(packed_layers(transformer))
        return original(cls, _WithWeights(transformer) if is_packed else transformer, lora_state_dict)

    return fit_lora


def wrap_expand_layers(original: Callable[..., bool]) -> Callable[..., bool]:
    """Wrap what widens layers for a Control LoRA, so that packed ones can be put back."""

    @functools.wraps(original)
    def expand_layers(cls: type, transformer: nn.Module, *args: Any, **kwargs: Any) -> bool:
        before = packed_layers(transformer)
        expanded = original(cls, transformer, *args, **kwargs)
        replaced = {
            name.removesuffix(".base_layer"): layer
            for name, layer in before.items()
            if transformer.get_submodule(name) is not layer
        }
        if replaced:
            setattr(transformer, _REPLACED, getattr(transformer, _REPLACED, {}) | replaced)
            overwritten = DIFFUSERS_OVERWRITTEN.require(transformer)
            decoded = {name: value.clone() for name, value in overwritten.items()}
            setattr(transformer, DIFFUSERS_OVERWRITTEN.name, decoded)
        return expanded

    return expand_layers


def wrap_unload_lora(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `FluxLoraLoaderMixin.unload_lora_weights`, so that the original layers that it puts back are packed."""

    @functools.wraps(original)
    def unload_lora_weights(self: Any, reset_to_overwritten_params: bool = False) -> None:
        original(self, reset_to_overwritten_params)
        transformer = getattr(self, self.transformer_name)
        if reset_to_overwritten_params and transformer is not None and packed_layers(transformer):
            for name, layer in vars(transformer).pop(_REPLACED, {}).items():
                transformer.set_submodule(name, layer.to(transformer.get_submodule(name).weight.device))

    return unload_lora_weights


def refuse_expanded(model: nn.Module) -> None:
    """Refuse to save a packed model some of whose layers a Control LoRA has replaced.

    Raises:
        ValueError: it has such layers.
    """
    if replaced := sorted(getattr(model, _REPLACED, {})):
        raise ValueError(
            f"Cannot save this {type(model).__name__}: a Control LoRA has replaced {', '.join(replaced)} by wider "
            "layers. Call `unload_lora_weights(reset_to_overwritten_params=True)` on the pipeline first."
        )
