"""Hooks of accelerate and diffusers on a model, and refusals of what they forbid."""

from __future__ import annotations

from typing import Any

from torch import nn

from .private_names import ACCELERATE_HOOK, DIFFUSERS_HOOK

# Name of the hook of group offloading in diffusers.
_GROUP_OFFLOADING = "group_offloading"


def refuse_dispatched(model: nn.Module, action: str) -> None:
    """Refuse to replace layers under the hooks of accelerate and diffusers, which would go on calling the old ones.

    Args:
        model: model of diffusers or transformers.
        action: verb of the requested action, for the message.

    Raises:
        ValueError: accelerate offloads the model or spreads it over devices; or it has a hook of diffusers, for group
            offloading, layerwise casting or caching.
    """
    if any(ACCELERATE_HOOK.read(module) is not None for module in model.modules()):
        raise ValueError(
            f"Cannot {action} this {type(model).__name__}: accelerate offloads it or spreads it over devices. Do it "
            "before, or take the hooks off by accelerate.hooks.remove_hook_from_submodules(model)."
        )
    if names := sorted({name for module in model.modules() for name in _diffusers_hooks(module)}):
        raise ValueError(
            f"Cannot {action} this {type(model).__name__}: diffusers has hooks on it ({', '.join(names)}), which "
            "would go on calling the old layers. Do it before they are put on."
        )


def refuse_offloaded(model: nn.Module) -> None:
    """Refuse to save a model whose tensors are elsewhere: emptied by accelerate, or by diffusers' group offloading.

    Raises:
        ValueError: accelerate offloads the model, or parts of it; or it is offloaded to the disk.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"Cannot save this {type(model).__name__}: accelerate keeps its weights elsewhere (sequential offloading, "
            'or a device map with "cpu" or "disk"). Save it before, or load it again without.'
        )
    hooks = [_diffusers_hooks(module).get(_GROUP_OFFLOADING) for module in model.modules()]
    if any(hook is not None and hook.config.offload_to_disk_path for hook in hooks):
        raise ValueError(
            f"Cannot save this {type(model).__name__}: group offloading has moved its weights to the disk. Save it "
            "before, or load it again."
        )


def _diffusers_hooks(module: nn.Module) -> dict[str, Any]:
    registry = DIFFUSERS_HOOK.read(module)
    hooks: dict[str, Any] = {} if registry is None else registry.hooks
    return hooks
