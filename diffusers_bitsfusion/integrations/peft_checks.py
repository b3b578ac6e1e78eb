"""Adapters of every kind on packed models: put in whole or not at all, merged right or refused by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..nn import PackedWeight, TimeFeatures
from ..nn.time_features import TimeFeaturePassThrough, TimeFeatureSlice
from ..utils.private_names import PEFT_ADAPTERS, PEFT_TARGETS
from .peft_lora import PackedLoraLayer

_REMOVED = (TimeFeatures, TimeFeaturePassThrough, TimeFeatureSlice)


def injecting_adapter(original: Callable[..., None]) -> Callable[..., None]:
    """`BaseTuner.inject_adapter` of PEFT; on a packed model an adapter that is refused leaves nothing behind."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not any(isinstance(module, (PackedWeight, *_REMOVED)) for module in model.modules()):
            original(self, model, adapter_name, *args, **kwargs)
            return
        config = self.peft_config[adapter_name]
        asked = signature.bind(self, model, adapter_name, *args, **kwargs).arguments
        names = [name for name, _ in model.named_modules() if PEFT_TARGETS.require(self)(config, name)]
        check_targets(model, asked.get("state_dict") or names)
        _check_modules_to_save(model, config.modules_to_save or ())
        before = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        try:
            original(self, model, adapter_name, *args, **kwargs)
        except Exception:
            _take_out(model, adapter_name, before)
            raise

    return inject_adapter


def check_targets(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse adapters of modules that time features have replaced.

    Args:
        model: a packed model.
        names: of modules that an adapter is for, or of its tensors.

    Raises:
        ValueError: one is of the time embedding, which is not there any more.
    """
    removed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, _REMOVED))
    found = sorted(name for name in names if f"{name}.".startswith(removed)) if removed else []
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(
            f"LoRA cannot adapt {found[0]}{more}: this model's time embedding was replaced by its features. Quantize "
            'with time_embedding="keep", or leave out what the adapter has for it.'
        )


def _check_modules_to_save(model: nn.Module, names: Iterable[str]) -> None:
    endings = tuple(names)
    for name, module in model.named_modules():
        if endings and name.endswith(endings) and any(isinstance(part, PackedWeight) for part in module.modules()):
            raise ValueError(
                f"modules_to_save names {name}, whose weights are packed: they cannot be trained whole. Name it in "
                "target_modules, or train the full-precision model by `prepare_qat`."
            )


def _take_out(model: nn.Module, adapter_name: str, before: set[str]) -> None:
    """Undo half an injection; `before`: names of the layers that had adapters."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        if name not in before:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.get_base_layer())
        elif adapter_name in PEFT_ADAPTERS.require(module)():
            module.delete_adapter(adapter_name)


def merging(original: Callable[..., Any]) -> Callable[..., Any]:
    """A method of PEFT's tuners that merges adapters into `self.model`, refused before it has merged any."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = signature.bind(self, *args, **kwargs)
        asked.apply_defaults()
        if asked.arguments.get("merge", True):
            check_fusable(self.model, asked.arguments["adapter_names"], asked.arguments["safe_merge"])
        return original(self, *args, **kwargs)

    return merge


def fusing_pipeline(original: Callable[..., None]) -> Callable[..., None]:
    """`LoraBaseMixin.fuse_lora` of diffusers, refused before it has fused into any component."""

    @functools.wraps(original)
    def fuse_lora(self: Any, components: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        asked = inspect.signature(original).bind(self, components, *args, **kwargs)
        asked.apply_defaults()
        for name in components or ():
            model = getattr(self, name, None)
            if isinstance(model, nn.Module):
                check_fusable(model, asked.arguments["adapter_names"], asked.arguments["safe_fusing"])
        original(self, components, *args, **kwargs)

    return fuse_lora


def check_fusable(model: nn.Module, adapter_names: list[str] | None, safe: bool = False) -> None:
    """Refuse fusing while some adapter on a packed layer could not be; LoRA alone can.

    Args:
        model: with PEFT adapters.
        adapter_names: adapters to fuse; the active ones when None.
        safe: whether their values must be finite.

    Raises:
        ValueError: see `PackedLoraLayer.check_foldable`; or an adapter is no LoRA (LoKr and the like).
    """
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or not isinstance(module.get_base_layer(), PackedWeight):
            continue
        names = module.active_adapters if adapter_names is None else adapter_names
        here = PEFT_ADAPTERS.require(module)()
        names = [adapter for adapter in names if adapter in here and adapter not in module.merged_adapters]
        if isinstance(module, PackedLoraLayer):
            module.check_foldable(names, finite=safe)
        elif names:
            kind = type(module).__module__.removeprefix("peft.tuners.").partition(".")[0]
            raise ValueError(
                f"The adapter {names[0]!r} on {name} ({kind}) is no LoRA and cannot be fused into packed weights. It "
                "works unfused, and can be fused after `dequantize()`."
            )
