"""Names that PEFT gives to the tensors of a model with adapters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def split_adapters(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Separate the tensors of PEFT's adapters from those of the model.

    Args:
        state_dict: tensors of a model with adapters, by name.

    Returns:
        (tensors of the model, under their names without PEFT; tensors of the adapters, under their own names).
    """
    wrappers = {name.partition(".base_layer.")[0] for name in state_dict if ".base_layer." in name}

    def is_wrapped(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:depth]) in wrappers for depth in range(1, len(parts)))

    plain, adapters = {}, {}
    for name, tensor in state_dict.items():
        if ".base_layer." in name or not is_wrapped(name):
            plain[name.replace(".base_layer", "")] = tensor
        else:
            adapters[name] = tensor
    return plain, adapters
