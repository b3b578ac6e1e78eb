"""The plan for a model and a config: which layers are packed, in which bits, and the form of the time embedding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from math import ceil, floor
from typing import Any

from diffusers import ModelMixin
from diffusers.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..allocation.average_bits import IN_OUT_LAYERS, PAPER_TIMESTEPS, cached_bits, is_in_out
from ..allocation.data_free import allocate_data_free
from ..codec.grid import cost_in_bits
from ..config.bitsfusion import BitsFusionConfig
from ..config.recipe import PUBLISHED, Recipe
from ..nn.conversion import why_not_packable
from ..nn.fake_quantized import FakeQuantizedWeight
from ..nn.packed import PackedWeight
from ..nn.time_path import TimePath, why_not_cacheable
from .plan import Plan
from .tensors import packable_tensors

logger = logging.get_logger(__name__)

# Bits in the file of a table of 1002 timesteps for each time feature, 5.4 an entry (docs/METHOD.md). A layer costs
# in_out_bits a weight, so the table is smaller where the time embedding is wider than this number over in_out_bits.
TABLE_BITS_PER_FEATURE = 5.4 * 1002

# Average bits of the data-free recipe that tells how sensitive layers are relative to each other: in the middle of the
# widths, so that few layers are at an end.
_MIDDLE_BITS = 4


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
    special = {*IN_OUT_LAYERS, *_time_names(TimePath.find(model), layers)}
    return {name: layer for name, layer in layers.items() if name not in special}


def make_plan(model: ModelMixin, config: BitsFusionConfig, exclude: Iterable[str] = ()) -> Plan:
    """Plan the quantization of an unquantized model.

    Args:
        model: diffusers model, whose parameters may be on the meta device.
        config: requested config.
        exclude: further names of modules that are not quantized, such as those that stay in fp32.

    Raises:
        ValueError: the model is quantized or prepared for training already, has adapters, or nothing to quantize;
            `modules_to_not_convert` names what it lacks, the recipe does not match it, or the target cannot be
            reached.
    """
    if any(isinstance(module, PackedWeight) for module in model.modules()):
        raise ValueError(f"This {type(model).__name__} is quantized already. Call `dequantize()` on it first.")
    if any(isinstance(module, FakeQuantizedWeight) for module in model.modules()):
        raise ValueError(f"This {type(model).__name__} is prepared for training. `convert()` packs it.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} has adapters. Call `unload_lora_weights()` before, after `fuse_lora()` if "
            "they are to stay in the weights; or load them afterwards."
        )
    if len(config.components_to_quantize or []) < 2:  # Of several components, another may have the module.
        check_excluded([model], config)
    exclude = [*config.modules_to_not_convert, *exclude]
    layers = quantizable_layers(model, exclude)
    path = TimePath.find(model)
    plan = Plan(
        {},
        *_plan_time(model, path, config),
        path,
        rounding=config.rounding,
        compression=config.compression,
        scale_dtype=config.scale_dtype,
        tensors=packable_tensors(model, exclude, config.embeddings),
    )
    time_layers = _time_names(path, layers)
    if plan.replaced_path is not None:
        layers = {name: layer for name, layer in layers.items() if name not in time_layers}
    if not layers and not plan.tensors:
        left = f" beside {', '.join(exclude)}, which stay as they are" if exclude else ""
        raise ValueError(f"This {type(model).__name__} has no layer to quantize{left}.")

    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    sizes |= {name: tensor.num_weights for name, tensor in plan.tensors.items()}
    special = [name for name in sizes if is_in_out(name) or name in time_layers]
    plan.bits = {name: config.in_out_bits for name in special}
    ordinary = {name: size for name, size in sizes.items() if name not in plan.bits}
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    shapes |= {name: tensor.shape for name, tensor in plan.tensors.items()}
    plan.bits |= _ordinary_bits(model, config, plan, ordinary, shapes, exclude)
    plan.bits = {name: plan.bits[name] for name in sizes if name in plan.bits}
    plan.decided = frozenset(name for name in ordinary if name in layers)
    return plan


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


def _time_names(path: TimePath | None, layers: Iterable[str]) -> set[str]:
    """Return the names of the time embedding's layers; without a path, by the names that diffusers gives them."""
    if path is not None:
        return set(path.layers)
    return {name for name in layers if matches(name, ("time_embedding", "time_emb_proj", "add_embedding"))}


def _plan_time(model: ModelMixin, path: TimePath | None, config: BitsFusionConfig) -> tuple[str, list[float]]:
    """Return (form of the time embedding, timesteps to cache), as in `Plan`."""
    requested = config.time_embedding
    kind = requested["type"] if isinstance(requested, dict) else requested
    timesteps = list(requested["timesteps"] if isinstance(requested, dict) and kind == "cache" else PAPER_TIMESTEPS)
    obstacle = why_not_cacheable(model) if path is None else None
    if path is not None and any(matches(name, config.modules_to_not_convert) for name in path.layers):
        obstacle = "modules_to_not_convert names a part of it"
        kind = "table" if kind == "auto" else kind  # "auto" would have been a table, which deserves the warning.
    if path is None or obstacle is not None:
        if kind in ("table", "cache"):
            logger.warning('The time embedding is kept, not replaced by a "%s": %s.', kind, obstacle)
        return "keep", timesteps
    if kind == "auto":
        width = path.layers["time_embedding.linear_2"].out_features
        kind = "table" if width * config.in_out_bits > TABLE_BITS_PER_FEATURE else "keep"
    return kind, timesteps


def _ordinary_bits(
    model: ModelMixin,
    config: BitsFusionConfig,
    plan: Plan,
    sizes: dict[str, int],
    shapes: dict[str, tuple[int, ...]],
    exclude: Iterable[str],
) -> dict[str, int]:
    """Return the bits of the layers that a recipe decides, and of any others that the recipe names.

    Args:
        model: model to quantize.
        config: requested config.
        plan: plan with the bits of the first, the last and the time embedding's layers.
        sizes: number of weights of the layers that a recipe decides, by name.
        shapes: weight shapes of all layers, by name.
        exclude: names of modules that are not quantized.
    """
    if config.recipe == "auto":
        published = Recipe.load(PUBLISHED)
        default_target = config.target_bits == BitsFusionConfig().target_bits
        skipped = [name for name in published if matches(name, config.modules_to_not_convert)]
        present = shapes | {name: published.shapes[name] for name in skipped}
        if default_target and published.fits(present) and set(sizes) <= set(published):
            return {name: published[name] for name in sizes}
        if config.target_bytes is not None:  # Only the differences between layers count.
            return allocate_data_free(sizes, cost_in_bits(_MIDDLE_BITS) * sum(sizes.values()))
        return _allocate(model, config, plan, sizes, exclude)
    if isinstance(config.recipe, int):
        return dict.fromkeys(sizes, config.recipe)
    recipe = config.recipe if isinstance(config.recipe, Recipe) else Recipe.load(config.recipe)
    for name in [name for name in plan.tensors if name not in recipe and name not in plan.bits]:
        del plan.tensors[name], sizes[name], shapes[name]  # Such a recipe knows layers alone.
    _check_recipe(recipe, model, sizes, shapes)
    return {name: bits for name, bits in recipe.items() if name in shapes}


def _check_recipe(recipe: Recipe, model: nn.Module, sizes: dict[str, int], shapes: dict[str, Any]) -> None:
    """Refuse a recipe that does not match the model."""
    modules = dict(model.named_modules())
    unknown = [
        name for name in recipe if name not in shapes and not isinstance(modules.get(name), (nn.Linear, nn.Conv2d))
    ]
    missing = [name for name in sizes if name not in recipe]
    other = [name for name in recipe if name in shapes and recipe.shapes.get(name, shapes[name]) != shapes[name]]
    for problem, names in (
        ("names layers that the model lacks", unknown),
        ("misses layers that the model has (give them bits, or name them in modules_to_not_convert)", missing),
        ("is for layers of another shape", other),
    ):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(f"The recipe {problem}: {shown}.")


def _allocate(
    model: ModelMixin, config: BitsFusionConfig, plan: Plan, sizes: dict[str, int], exclude: Iterable[str]
) -> dict[str, int]:
    """Allocate bits to the layers of `sizes` for the target, without an analysis."""
    fixed, weights = fixed_bits(model, plan, plan.bits, exclude)
    try:
        return allocate_data_free(sizes, config.target_bits * weights - fixed, balance=config.balance)
    except ValueError as error:
        total = sum(sizes.values())
        low, high = ((fixed + cost_in_bits(bits, config.balance) * total) / weights for bits in (1, 7))
        reach = f"With these settings target_bits goes from {ceil(100 * low) / 100} to {floor(100 * high) / 100}"
        if plan.time_embedding == "keep" and plan.time_path is not None:
            reach += '; time_embedding="table" takes fewer bits than layers of in_out_bits'
        raise ValueError(
            f"target_bits={config.target_bits} cannot be reached for this model: {error}. {reach}."
        ) from error


def fixed_bits(
    model: ModelMixin, plan: Plan, special: Mapping[str, int], exclude: Iterable[str] = ()
) -> tuple[float, int]:
    """Return the part of the paper's average bits that a recipe does not decide.

    Args:
        model: unquantized model.
        plan: plan of the model.
        special: bits of the first, the last and the time embedding's layers, by name.
        exclude: names of modules that are not quantized.

    Returns:
        (bits of `special` and of the time features, number of weights that the average is over).
    """
    sizes = {name: layer.weight.numel() for name, layer in quantizable_layers(model, exclude).items()}
    sizes |= {name: tensor.num_weights for name, tensor in plan.tensors.items()}
    fixed: float = sum(cost_in_bits(bits) * sizes[name] for name, bits in special.items())
    if plan.replaced_path is not None:
        features = sum(size for _, size in plan.replaced_path.sizes)
        fixed += cached_bits(features, len(plan.timesteps))
    return fixed, sum(sizes.values())
