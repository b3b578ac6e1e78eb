"""LoRA on packed layers: PEFT's adapters, and fusing them into a low-rank branch that the layer keeps."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from diffusers.utils import logging
from peft import LoraConfig
from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..nn import BitsFusionConv2d, BitsFusionLinear, PackedWeight, QATConv2d
from ..nn.packed import without_weight
from ..utils.private_names import PEFT_ADAPTERS

logger = logging.get_logger(__name__)

# Initialisations of PEFT that take the product of the halves out of the base weight, which a branch can do.
_SUBTRACTING_INITS = ("pissa", "olora")

# Those that change it in other ways, or need what was computed on it before.
_REWRITING_INITS = ("corda", "loftq", "lora_ga")


class ShownLayer(LoraLayer):
    """A LoRA layer that can show PEFT another layer than its own, while PEFT makes an adapter."""

    _shown: nn.Module | None = None

    def get_base_layer(self) -> nn.Module:
        return super().get_base_layer() if self._shown is None else self._shown

    @contextmanager
    def _showing(self, layer: nn.Module) -> Iterator[None]:
        self.__dict__["_shown"] = layer  # not as a module of this one
        try:
            yield
        finally:
            self.__dict__["_shown"] = None


class PackedLoraLayer(ShownLayer):
    """What LoRA layers on packed weights do otherwise than PEFT's.

    PEFT merges by adding to `base_layer.weight.data`, which a decoded weight refuses. Here merging extends the
    low-rank branch of the packed layer, and unmerging cuts it back. Around a layer that is not packed (any more), all
    is PEFT's.
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
        self.check_foldable(names, finite=safe_merge)
        downs = torch.cat([self.lora_A[name].weight for name in names])
        ups = torch.cat([self._scaled_up(name) for name in names], dim=1)
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

    def check_foldable(self, adapter_names: Iterable[str], finite: bool = False) -> None:
        """Refuse adapters that are more than a low-rank addition to the weight.

        Args:
            adapter_names: adapters that this layer need not have.
            finite: refuse those with NaN or infinite values, too.

        Raises:
            ValueError: one is a DoRA or another variant of LoRA, or has a bias; the convolution has groups; the
                weights are offloaded; or values are not finite.
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
            elif finite and not all(torch.isfinite(half[name].weight).all() for half in (self.lora_A, self.lora_B)):
                raise ValueError(f"The adapters {name} hold NaN or infinite values; they were not merged.")
            else:
                continue
            raise ValueError(
                f"The adapter {name!r} cannot be fused into packed weights: {reason}. It works unfused, and can be "
                "fused after `dequantize()`."
            )

    def update_layer(self, adapter_name: str, *args: Any, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does.

        What PiSSA and OLoRA take out of the base weight is a branch here, since it is of the adapter's rank.

        Raises:
            ValueError: the config asks for an initialisation that changes the base weight otherwise; or for one of
                those two while adapters are merged.
        """
        base, init = self.get_base_layer(), config.init_lora_weights
        if not _is_packed(base) or not isinstance(init, str):
            super().update_layer(adapter_name, *args, config=config, **kwargs)
            return
        if init.startswith(_REWRITING_INITS):
            raise ValueError(
                f"init_lora_weights={init!r} changes the base weight, which packed weights cannot take. "
                'Use True, "gaussian", "pissa" or "olora".'
            )
        if not init.startswith(_SUBTRACTING_INITS):
            super().update_layer(adapter_name, *args, config=config, **kwargs)
            return
        if self.merged:
            raise ValueError(f"init_lora_weights={init!r} changes the base weight: unmerge the other adapters first.")
        with self._showing(_dense_layer(base)):
            super().update_layer(adapter_name, *args, config=config, **kwargs)
        base.extend_branch(self.lora_A[adapter_name].weight, -self._scaled_up(adapter_name))

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        # KaSA truncates the base weight.
        return {fields: variant for fields, variant in super().lora_variants.items() if "kasa_config" not in fields}

    def _scaled_up(self, name: str) -> Tensor:
        return self.lora_B[name].weight.float() * self.scaling[name]


class PackedLoraLinear(PackedLoraLayer, Linear):
    """PEFT's LoRA layer around a `BitsFusionLinear`."""


class LoraConv2dOfPlainHalves(ShownLayer, Conv2d):
    """PEFT's LoRA layer around a convolution whose class has no constructor.

    PEFT makes the two halves of an adapter by `type(base_layer)(...)`. While it does, this layer shows it an
    `nn.Conv2d` of the same geometry and weight instead.
    """

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does."""
        base = self.get_base_layer()
        shown = without_weight(nn.Conv2d, base)
        shown.__dict__["weight"] = base.weight
        with self._showing(shown):
            super().update_layer(*args, **kwargs)


class PackedLoraConv2d(PackedLoraLayer, LoraConv2dOfPlainHalves):
    """PEFT's LoRA layer around a `BitsFusionConv2d`."""


def _dense_layer(layer: PackedWeight) -> nn.Linear:
    """An `nn.Linear` on a copy of the decoded weight."""
    dense = without_weight(nn.Linear, layer)
    dense.weight = nn.Parameter(layer.dense_weight(layer.weight_dtype), requires_grad=False)
    return dense


_LORA_LAYERS: dict[type[nn.Module], Any] = {
    BitsFusionLinear: PackedLoraLinear,
    BitsFusionConv2d: PackedLoraConv2d,
    QATConv2d: LoraConv2dOfPlainHalves,
}


def _is_packed(layer: nn.Module) -> TypeGuard[PackedWeight]:
    return isinstance(layer, PackedWeight)


def creating_lora_layer(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`LoraModel._create_new_module` of PEFT with our layers for packed modules, ahead of all of PEFT's choices.

    Ahead, because one of them (torchao's) reads every module's weight, and the last takes any `nn.Linear`.
    """

    @functools.wraps(original)
    def create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kind = next((kind for packed, kind in _LORA_LAYERS.items() if isinstance(base, packed)), None)
        if kind is None or kwargs.get("parameter_name") is not None:
            return original(lora_config, adapter_name, target, **kwargs)
        kwargs.pop("parameter_name", None)
        return kind(target, adapter_name, config=lora_config, **kwargs)

    return create_new_module


def prepare_saving(model: Any) -> None:
    """Put the ranks of all branches into a packed model's config; say which adapters will not be saved."""
    ranks, unfused = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            ranks[name.replace(".base_layer", "")] = module.branch_rank
        elif isinstance(module, BaseTunerLayer):
            here = set(PEFT_ADAPTERS.require(module)())
            unfused |= here.intersection(module.active_adapters).difference(module.merged_adapters)
    config = model.hf_quantizer.quantization_config
    config.schema = config.schema.with_branch_ranks(ranks)
    if unfused:
        logger.warning(
            f"The model is saved without its adapters {', '.join(sorted(unfused))}: save them by "
            "`save_lora_weights`, or call `fuse_lora()` first to save them in the model."
        )
