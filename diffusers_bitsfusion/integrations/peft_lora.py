"""LoRA on packed layers: PEFT's adapters, and fusing them into a low-rank branch that the layer keeps."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import torch
from diffusers.utils import logging
from peft import LoraConfig
from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..nn import BitsFusionConv2d, BitsFusionLinear, PackedWeight
from ..nn.time_features import TimeFeatureSlice

logger = logging.get_logger(__name__)

# Initialisations of PEFT that take their share out of the base weight.
_REWRITING_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")


class PackedLoraLayer(LoraLayer):
    """What LoRA layers on packed weights do otherwise than PEFT's.

    PEFT merges by adding to `base_layer.weight.data`; a computed weight would lose that without a word. Here merging
    extends the low-rank branch of the packed layer, and unmerging cuts it back. Device, dtype and sizes of the base
    layer are answered without decoding it. Around a layer that is not packed (any more), all is PEFT's.
    """

    _unmerged_rank = 0

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters, times their scaling, into the packed layer's branch.

        Args:
            safe_merge: refuse adapters with NaN or infinite values.
            adapter_names: the active adapters when left out.

        Raises:
            ValueError: an adapter cannot be folded (see `check_foldable`) or, with `safe_merge`, is not finite.
                Nothing has been merged then.
        """
        base = self.get_base_layer()
        if not _is_packed(base):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        self.check_foldable(names)
        downs = torch.cat([self.lora_A[name].weight for name in names])
        ups = torch.cat([self._scaled_up(name) for name in names], dim=1)
        if safe_merge and not (torch.isfinite(downs).all() and torch.isfinite(ups).all()):
            raise ValueError(f"The adapters {', '.join(names)} hold NaN or infinite values; they were not merged.")
        if not self.merged:
            self._unmerged_rank = base.branch_rank
        base.extend_branch(downs, ups)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take all merged adapters out of the packed layer's branch, which is then what it was, bit for bit."""
        base = self.get_base_layer()
        if not _is_packed(base):
            super().unmerge()
        elif not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        else:
            base.shrink_branch(self._unmerged_rank)
            self.merged_adapters.clear()

    def check_foldable(self, adapter_names: Iterable[str]) -> None:
        """Refuse adapters that are more than a low-rank addition to the weight.

        Raises:
            ValueError: one is a DoRA or another variant of LoRA, or has a bias; the convolution has groups; or the
                weights are offloaded.
        """
        base = self.get_base_layer()
        for name in adapter_names:
            if name not in self.lora_A:
                continue
            if name in self.lora_variant:
                reason = f"{type(self.lora_variant[name]).__name__} changes the weight by more than a low-rank matrix"
            elif self.lora_bias[name]:
                reason = "it has a bias (lora_bias=True)"
            elif getattr(base, "groups", 1) > 1:
                reason = f"a convolution of {base.groups} groups has no low-rank branch"
            elif base.codes.is_meta or self.lora_A[name].weight.is_meta:
                reason = "the weights are offloaded; fuse before offloading"
            else:
                continue
            raise ValueError(
                f"The adapter {name!r} cannot be fused into packed weights: {reason}. It works unfused, and can be "
                "fused after `dequantize()`."
            )

    def update_layer(self, adapter_name: str, *args: Any, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does.

        Raises:
            ValueError: the config asks for an initialisation that changes the base weight.
        """
        init = config.init_lora_weights
        if _is_packed(self.get_base_layer()) and isinstance(init, str) and init.startswith(_REWRITING_INITS):
            raise ValueError(
                f"init_lora_weights={init!r} changes the base weight, which packed weights cannot take. "
                'Use True or "gaussian".'
            )
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer."""
        return self.get_base_layer().weight

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        # KaSA truncates the base weight.
        return {fields: variant for fields, variant in super().lora_variants.items() if "kasa_config" not in fields}

    def _scaled_up(self, name: str) -> Tensor:
        return self.lora_B[name].weight.float() * self.scaling[name]

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        if isinstance(module, BitsFusionLinear):
            return module.in_features, module.out_features
        return super()._get_in_out_features(module)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        if _is_packed(base_layer):
            return base_layer.codes.device, base_layer.weight_dtype
        return super()._get_base_layer_device_and_dtype(base_layer)


class PackedLoraLinear(PackedLoraLayer, Linear):
    """PEFT's LoRA layer around a `BitsFusionLinear`."""


class PackedLoraConv2d(PackedLoraLayer, Conv2d):
    """PEFT's LoRA layer around a `BitsFusionConv2d`."""


def _is_packed(layer: nn.Module) -> TypeGuard[PackedWeight]:
    return isinstance(layer, PackedWeight) and layer.is_packed


def creating_lora_layer(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`LoraModel._create_new_module` of PEFT with our layers for packed modules, ahead of all of PEFT's choices.

    Ahead, because one of them (torchao's) reads every module's weight, and the last takes any `nn.Linear`.
    """

    @functools.wraps(original)
    def create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(target, TimeFeatureSlice):
            raise ValueError(
                f"LoRA cannot adapt {kwargs.get('target_name')}: this model's time embedding was replaced by its "
                'features. Quantize with time_embedding="keep", or leave out what the adapter has for it.'
            )
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not _is_packed(base) or kwargs.get("parameter_name") is not None:
            return original(lora_config, adapter_name, target, **kwargs)
        kwargs.pop("parameter_name", None)
        kind = PackedLoraConv2d if isinstance(base, BitsFusionConv2d) else PackedLoraLinear
        return kind(target, adapter_name, config=lora_config, **kwargs)

    return create_new_module


def check_fusable(model: Any, adapter_names: list[str] | None) -> None:
    """Refuse fusing while some adapter on a packed layer could not be.

    Args:
        model: a packed model with PEFT adapters.
        adapter_names: adapters to fuse; the active ones when None.

    Raises:
        ValueError: see `PackedLoraLayer.check_foldable`; or an adapter is no LoRA (LoKr and the like).
    """
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or not _is_packed(module.get_base_layer()):
            continue
        if not isinstance(module, PackedLoraLayer):
            raise ValueError(
                f"The adapter on {name} ({type(module).__module__}) is no LoRA and cannot be fused into packed "
                "weights. It works unfused, and can be fused after `dequantize()`."
            )
        module.check_foldable(module.active_adapters if adapter_names is None else adapter_names)


def prepare_saving(model: Any) -> None:
    """Put the ranks of all branches into a packed model's config; say which adapters will not be saved."""
    ranks, unfused = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight) and module.is_packed:
            ranks[name.replace(".base_layer", "")] = module.branch_rank
        elif isinstance(module, BaseTunerLayer):
            here = set(module._all_available_adapter_names())
            unfused |= here.intersection(module.active_adapters).difference(module.merged_adapters)
    config = model.hf_quantizer.quantization_config
    config.schema = config.schema.with_branch_ranks(ranks)
    if unfused:
        logger.warning(
            f"The model is saved without its adapters {', '.join(sorted(unfused))}: save them by "
            "`save_lora_weights`, or call `fuse_lora()` first to save them in the model."
        )
