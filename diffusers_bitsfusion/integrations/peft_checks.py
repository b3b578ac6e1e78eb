"""Checks of PEFT adapters on packed models: they are injected and merged completely, or refused by name."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from diffusers.loaders import lora_base
from peft import LoraConfig, PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..nn import PackedWeight, TimeFeatures
from ..nn.low_rank_branch import LowRankBranch
from ..nn.packed_tensor import HoldsPackedTensors
from ..nn.time_features import TimeFeaturePassThrough, TimeFeatureSlice
from ..utils.private_names import DIFFUSERS_FETCH_LORA, PEFT_ADAPTERS, PEFT_PREPARE, PEFT_TARGETS
from .peft_lora import reads_base_weight
from .peft_merging import MergesIntoBranch, let_merge, tuner_of

_PACKED = (PackedWeight, HoldsPackedTensors)
# Arguments of `load_lora_adapter` that say how the file is found.
_FILE_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token", "use_safetensors",
    "weight_name",
)  # fmt: skip
_REMOVED = (TimeFeatures, TimeFeaturePassThrough, TimeFeatureSlice)


def wrap_inject_adapter(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `BaseTuner.inject_adapter` of PEFT, so that a refused adapter leaves nothing behind on a packed model."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not any(isinstance(module, (*_PACKED, *_REMOVED)) for module in model.modules()):
            original(self, model, adapter_name, *args, **kwargs)
            return
        # Targets that are not given are known by the architecture.
        config = copy.copy(self.peft_config[adapter_name])
        config = PEFT_PREPARE.require(self)(config, self.get_model_config(model))
        arguments = signature.bind(self, model, adapter_name, *args, **kwargs).arguments
        names = [name for name, _ in model.named_modules() if PEFT_TARGETS.require(self)(config, name)]
        check_targets(model, arguments.get("state_dict") or names, config)
        # Some tuners have no `modules_to_save`.
        _check_modules_to_save(model, getattr(config, "modules_to_save", None) or ())
        if config.peft_type == PeftType.LN_TUNING:
            _check_trained_norms(model, names)
        before = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        branches = [(module, module.branch_rank) for module in model.modules() if isinstance(module, LowRankBranch)]
        try:
            original(self, model, adapter_name, *args, **kwargs)
        except Exception:
            _remove_adapter(model, adapter_name, before)
            for module, rank in branches:  # PiSSA extends branches.
                if module.branch_rank > rank:
                    module.shrink_branch(rank)
            raise
        let_merge(model)

    return inject_adapter


def read_lora(source: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a LoRA that diffusers is about to load.

    Args:
        source: as `load_lora_adapter` takes it: a folder, a Hub id or the tensors themselves.
        arguments: keyword arguments of `load_lora_adapter`; those that say how the file is found are taken out, and
            the metadata of the file are put in.
    """
    if isinstance(source, dict):
        return source
    options = {name: arguments.pop(name, None) for name in _FILE_ARGUMENTS}
    agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    fetch = DIFFUSERS_FETCH_LORA.require(lora_base)
    lora: dict[str, Tensor]
    lora, arguments["metadata"] = fetch(
        source, user_agent=agent, allow_pickle=False, metadata=arguments.get("metadata"), **options
    )
    return lora


def check_targets(model: nn.Module, names: Iterable[str], config: PeftConfig | None = None) -> None:
    """Refuse adapters of modules that time features have replaced.

    A plain LoRA of a block's `time_emb_proj` is welcome where the table has the time embedding beside the features.

    Args:
        model: packed model.
        names: names of the modules that an adapter is for, or of its tensors.
        config: config of the adapter; a plain LoRA's when None.

    Raises:
        ValueError: a name is of a module that the model no longer has.
    """
    modules = {f"{name.removesuffix('.base_layer')}.": module for name, module in model.named_modules()}
    replaced = {name: module for name, module in modules.items() if isinstance(module, _REMOVED)}
    projections = tuple(name for name, m in replaced.items() if isinstance(m, TimeFeatureSlice) and m.in_features)
    plain = config is None or (isinstance(config, LoraConfig) and not reads_base_weight(config))
    refused = sorted(
        name
        for name in names
        if f"{name}.".startswith(tuple(replaced)) and not (plain and f"{name}.".startswith(projections))
    )
    if not refused:
        return
    more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    if not projections:
        lacking = " alone (a cache, or a file of an earlier version, lacks the time embedding)"
    else:
        lacking = "" if plain else ", without the weights of time_emb_proj; a plain LoRA does not need them"
    raise ValueError(
        f"LoRA cannot adapt {refused[0]}{more}: this model's time embedding was replaced by its features{lacking}. "
        'Quantize with time_embedding="keep", or leave out what the adapter has for it.'
    )


def _check_modules_to_save(model: nn.Module, names: Iterable[str]) -> None:
    endings = tuple(names)
    for name, module in model.named_modules():
        if endings and name.endswith(endings) and any(isinstance(part, _PACKED) for part in module.modules()):
            raise ValueError(
                f"modules_to_save names {name}, whose weights are packed: they cannot be trained whole. Name it in "
                "target_modules, or train the full-precision model by `prepare_qat`."
            )


def _check_trained_norms(model: nn.Module, targets: Iterable[str]) -> None:
    """Refuse targets of LNTuning, which trains them whole, whose weights are packed."""
    for name in targets:
        if any(isinstance(part, _PACKED) for part in model.get_submodule(name).modules()):
            raise ValueError(
                f"target_modules names {name}, whose weights are packed: LNTuning would train them whole. Name norms "
                "alone, or take another tuner, such as LoRA."
            )


def _remove_adapter(model: nn.Module, adapter_name: str, before: set[str]) -> None:
    """Remove an adapter whose injection failed; `before` holds the names of the layers that had adapters already."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        if name not in before:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.get_base_layer())
        elif adapter_name in PEFT_ADAPTERS.require(module)():
            module.delete_adapter(adapter_name)


def wrap_merge(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of PEFT's tuners that merges adapters into `self.model`, so that it refuses before merging any."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        if bound.arguments.get("merge", True):
            check_fusable(self.model, bound.arguments["adapter_names"], bound.arguments["safe_merge"])
        return original(self, *args, **kwargs)

    return merge


def wrap_fuse_lora(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `LoraBaseMixin.fuse_lora` of diffusers, so that it refuses before it fuses into any component."""

    @functools.wraps(original)
    def fuse_lora(self: Any, components: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(original).bind(self, components, *args, **kwargs)
        bound.apply_defaults()
        for name in components or ():
            model = getattr(self, name, None)
            if isinstance(model, nn.Module):
                check_fusable(model, bound.arguments["adapter_names"], bound.arguments["safe_fusing"])
        original(self, components, *args, **kwargs)

    return fuse_lora


def check_fusable(model: nn.Module, adapter_names: list[str] | None, safe: bool = False) -> None:
    """Refuse to fuse if an adapter on a packed layer cannot be fused.

    Args:
        model: model with PEFT adapters.
        adapter_names: names of the adapters to fuse; the active ones when None.
        safe: whether the values of the adapters must be finite.

    Raises:
        ValueError: an adapter is no addition to the weight (but OFT, for example); or see
            `MergesIntoBranch.check_foldable`.
    """
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or not isinstance(
            module.get_base_layer(), (LowRankBranch, HoldsPackedTensors)
        ):
            continue
        names = module.active_adapters if adapter_names is None else adapter_names
        present = PEFT_ADAPTERS.require(module)()
        names = [adapter for adapter in names if adapter in present and adapter not in module.merged_adapters]
        if isinstance(module, MergesIntoBranch):
            module.check_foldable(names, finite=safe)
        elif names and (reason := _why_not_merged(module)):
            raise ValueError(
                f"The adapter {names[0]!r} on {name} ({tuner_of(module)}) cannot be fused into packed weights: "
                f"{reason}. It works unfused, and can be fused after `dequantize()`."
            )


def _why_not_merged(module: BaseTunerLayer) -> str | None:
    base = module.get_base_layer()
    if not isinstance(base, PackedWeight):
        return "the layer has no low-rank branch"
    if tuner_of(module) != "beft":
        return "what it does to the weight is no addition of low rank"
    # PEFT's own merging changes the bias alone, which is no code.
    return "it adds to the bias, and the layer has none" if base.bias is None else None
