"""Hooks of accelerate and diffusers on a model: what must not be done while they are there."""

from __future__ import annotations

from torch import nn

from .private_names import ACCELERATE_HOOK, DIFFUSERS_HOOK

_GROUP_OFFLOADING = "group_offloading"  # diffusers' name of it


def refuse_dispatched(model: nn.Module, action: str) -> None:
    """Refuse to swap layers under the hooks of accelerate and diffusers, which hold on to the old ones.

    Args:
        model: of diffusers or transformers.
        action: what was asked for, for the message.

    Raises:
        ValueError: accelerate offloads the model or spreads it over devices; or a hook of diffusers is on it, for
            group offloading, layerwise casting or caching.
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


def refuse_offloaded_to_disk(model: nn.Module) -> None:
    """Refuse to save a model whose tensors diffusers' group offloading has emptied.

    Raises:
        ValueError: it is offloaded to the disk.
    """
    hooks = [_diffusers_hooks(module).get(_GROUP_OFFLOADING) for module in model.modules()]
    if any(hook is not None and hook.config.offload_to_disk_path for hook in hooks):
        raise ValueError(
            f"Cannot save this {type(model).__name__}: group offloading has moved its weights to the disk. Save it "
            "before, or load it again."
        )


def _diffusers_hooks(module: nn.Module) -> dict:
    registry = DIFFUSERS_HOOK.read(module)
    return {} if registry is None else registry.hooks
