"""Choice of a model's layers: which can be packed, which a recipe decides, which a user excludes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from diffusers import ModelMixin
from torch import nn

from ..allocation.average_bits import IN_OUT_LAYERS
from ..config.bitsfusion import BitsFusionConfig
from ..nn.conversion import why_not_packable
from ..nn.time_path import TimePath


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a dotted part of `name` equals one of `patterns`: "attn2.to_k" is in "...0.attn2.to_k"."""
    return any(f".{pattern}." in f".{name}." for pattern in patterns)


def quantizable_layers(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the Linear and Conv2d layers by name, without those that match `exclude` or cannot be replaced."""
    patterns = list(exclude)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not matches(name, patterns) and not why_not_packable(module)
    }


def recipe_layers(model: ModelMixin, exclude: Iterable[str] = ()) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers whose bits a recipe decides, by name: all but the first, the last and the time embedding's."""
    layers = quantizable_layers(model, exclude)
    special = {*IN_OUT_LAYERS, *time_names(TimePath.find(model), layers)}
    return {name: layer for name, layer in layers.items() if name not in special}


def time_names(path: TimePath | None, layers: Iterable[str]) -> set[str]:
    """Return the names of the time embedding's layers; without a path, by the names that diffusers gives them."""
    if path is not None:
        return set(path.layers)
    return {name for name in layers if matches(name, ("time_embedding", "time_emb_proj", "add_embedding"))}


def check_excluded(models: Sequence[nn.Module], config: BitsFusionConfig) -> None:
    """Refuse `modules_to_not_convert` that none of the models to quantize has, which would silently do nothing.

    Raises:
        ValueError: a name is neither the name of a module nor a part of one.
    """
    names = [name for model in models for name, _ in model.named_modules()]
    unknown = [
        pattern for pattern in config.modules_to_not_convert if not any(matches(name, [pattern]) for name in names)
    ]
    if unknown:
        parts = {part for name in names for part in (name, *name.split("."))}
        close = get_close_matches(unknown[0], sorted(parts), 3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        owners = " and ".join(type(model).__name__ for model in models)
        raise ValueError(f"modules_to_not_convert: {owners} has no {', '.join(unknown)}.{hint}")
