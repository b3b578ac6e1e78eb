"""LoRA on packed layers: PEFT's adapters, and fusing them into a low-rank branch of the layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging
from peft import LoraConfig
from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..codec.time_schema import TimeFeaturesSchema
from ..nn import BitsFusionConv2d, BitsFusionLinear, PackedWeight, QATConv2d
from ..nn.low_rank_time_features import LowRankTimeFeatures
from ..nn.packed import without_weight
from ..nn.time_features import TimeFeatureSlice
from ..utils.private_names import PEFT_ADAPTERS, PEFT_KASA
from .peft_folding import fold, low_rank_halves, why_not_foldable
from .peft_merging import MergesIntoBranch

logger = logging.get_logger(__name__)

# Names of initialisations of PEFT that subtract the adapter's product from the base weight, as a branch can.
_SUBTRACTING_INITS = ("pissa", "olora")

# Names of initialisations of PEFT that change the base weight otherwise, or need statistics of it.
_REWRITING_INITS = ("corda", "loftq", "lora_ga")


# Names of initialisations of PEFT that do not look at the base weight.
_PLAIN_INITS = ("gaussian", "eva")


if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer as _Module  # torch types its modules' attributes otherwise.
else:
    _Module = nn.Module


class SubstitutedBaseLayer(_Module, LoraLayer):
    """LoRA layer that can give PEFT a substitute for its base layer while PEFT makes an adapter."""

    _substitute: nn.Module | None = None

    def get_base_layer(self) -> nn.Module:
        """Return the base layer, or its substitute, when PEFT makes, merges or runs an adapter."""
        return super().get_base_layer() if self._substitute is None else self._substitute

    @contextmanager
    def _substituting(self, layer: nn.Module) -> Iterator[None]:
        self.__dict__["_substitute"] = layer  # nn.Module would register an attribute as a submodule.
        try:
            yield
        finally:
            self.__dict__["_substitute"] = None


class PackedLoraLayer(MergesIntoBranch, SubstitutedBaseLayer):
    """Mixin of LoRA layers on packed weights."""

    def _fold(self, names: list[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        return fold(self, names)

    def _added_bias(self, name: str) -> Tensor | None:
        return self.lora_B[name].bias.detach() * self.scaling[name] if self.lora_bias[name] else None

    def _why_not_mergeable(self, name: str) -> str | None:
        if reason := why_not_foldable(self, name):
            return reason
        if self.lora_bias[name] and getattr(self.get_base_layer(), "bias", None) is None:
            return "it has a bias (lora_bias=True), and the layer has none"
        return None

    def _changes(self, name: str) -> Iterator[Tensor]:
        yield from low_rank_halves(self, name)
        if (bias := self._added_bias(name)) is not None:
            yield bias

    def update_layer(self, adapter_name: str, *args: Any, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does.

        PiSSA, OLoRA and KaSA subtract a matrix of the adapter's rank from the base weight: here it becomes a branch.

        Raises:
            ValueError: the config requests an initialisation that changes the base weight otherwise; or one of those
                while adapters are merged.
        """
        base, init = self.get_base_layer(), config.init_lora_weights
        if isinstance(base, BitsFusionLinear) and getattr(config, "kasa_config", None) is not None:
            self._refuse_merged("kasa_config")
            with self._substituting(_dense_layer(base)):
                super().update_layer(adapter_name, *args, config=config, **kwargs)
            self._truncate(base, adapter_name)
            return
        if not isinstance(base, PackedWeight) or not isinstance(init, str):
            super().update_layer(adapter_name, *args, config=config, **kwargs)
            return
        if init.lower().startswith(_REWRITING_INITS):
            raise ValueError(
                f"init_lora_weights={init!r} changes the base weight, which packed weights cannot take. "
                'Use True, "gaussian", "pissa" or "olora".'
            )
        # PEFT has no such initialisation for convolutions.
        if not init.lower().startswith(_SUBTRACTING_INITS) or isinstance(base, nn.Conv2d):
            super().update_layer(adapter_name, *args, config=config, **kwargs)
            return
        self._refuse_merged(f"init_lora_weights={init!r}")
        with self._substituting(_dense_layer(base)):
            super().update_layer(adapter_name, *args, config=config, **kwargs)
        base.extend_branch(self.lora_A[adapter_name].weight, -low_rank_halves(self, adapter_name)[1])

    def _refuse_merged(self, option: str) -> None:
        if self.merged:
            raise ValueError(f"{option} changes the base weight: unmerge the other adapters first.")

    def _truncate(self, base: BitsFusionLinear, adapter_name: str) -> None:
        """Subtract the components of the smallest singular values, as many as the adapter's rank (KaSA)."""
        left, values, right = torch.linalg.svd(base.dense_weight(torch.float32), full_matrices=False)
        kept = len(values) - self.r[adapter_name]
        base.extend_branch(right[kept:], -left[:, kept:] * values[kept:])
        # PEFT puts it off until the first call where the adapter has no values yet.
        PEFT_KASA.require(self).discard(adapter_name)


class PackedLoraLinear(PackedLoraLayer, Linear):
    """PEFT's LoRA layer around a `BitsFusionLinear`."""


class QATLoraConv2d(SubstitutedBaseLayer, Conv2d):
    """PEFT's LoRA layer around a convolution whose class has no constructor.

    PEFT makes the two halves of an adapter by `type(base_layer)(...)`. Meanwhile the base layer is substituted by an
    `nn.Conv2d` of the same geometry and weight.
    """

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does."""
        base = self.get_base_layer()
        substitute = without_weight(nn.Conv2d, base)
        substitute.__dict__["weight"] = base.weight
        with self._substituting(substitute):
            super().update_layer(*args, **kwargs)


class PackedLoraConv2d(PackedLoraLayer, QATLoraConv2d):
    """PEFT's LoRA layer around a `BitsFusionConv2d`."""


def reads_base_weight(config: LoraConfig) -> bool:
    """Return whether a LoRA reads the weight that it is added to, as DoRA and starts such as PiSSA do."""
    variants = [field.name for field in fields(config) if field.metadata.get("is_lora_variant")]
    init = config.init_lora_weights
    starts_from_it = isinstance(init, str) and init.lower() not in _PLAIN_INITS
    return starts_from_it or any(getattr(config, name) for name in variants)


class TimeProjectionLora(PackedLoraLayer, Linear):
    """PEFT's LoRA layer around the `TimeFeatureSlice` of a `time_emb_proj`, which has no weight.

    The two halves of an adapter take the time embedding, which comes after the features.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        sizes: Any = module
        return sizes.in_features, sizes.out_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the block's features with the adapters' products added."""
        base = self.get_base_layer()
        if not isinstance(base, TimeFeatureSlice):  # The model was dequantized.
            dense: Tensor = super().forward(x, *args, **kwargs)
            return dense
        self._check_forward_args(x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        features: Tensor = base(x)
        if self.disable_adapters or self.merged:
            return features
        result, embedding = features, base.embedding(x)
        for name in self.active_adapters:
            if name in self.lora_A:
                taken = self.lora_dropout[name](self._cast_input_dtype(embedding, self.lora_A[name].weight.dtype))
                result = result + self.lora_B[name](self.lora_A[name](taken)) * self.scaling[name]
        return result.to(features.dtype)


def _dense_layer(layer: PackedWeight) -> nn.Linear:
    """Return an `nn.Linear` with a copy of the decoded weight."""
    dense = without_weight(nn.Linear, layer)
    dense.weight = nn.Parameter(layer.dense_weight(layer.weight_dtype), requires_grad=False)
    return dense


_LORA_LAYERS: dict[type[nn.Module], Any] = {
    BitsFusionLinear: PackedLoraLinear,
    BitsFusionConv2d: PackedLoraConv2d,
    QATConv2d: QATLoraConv2d,
    TimeFeatureSlice: TimeProjectionLora,
}


def wrap_create_new_module(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wrap `LoraModel._create_new_module` of PEFT, so that packed modules get the LoRA layers of this package.

    They come before all of PEFT's choices, since one of those (torchao's) reads the weight of every module, and the
    last accepts any `nn.Linear`.
    """

    @functools.wraps(original)
    def create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kind = next((kind for packed, kind in _LORA_LAYERS.items() if isinstance(base, packed)), None)
        if kind is None or kwargs.get("parameter_name") is not None:
            return original(lora_config, adapter_name, target, **kwargs)
        kwargs.pop("parameter_name", None)
        layer: nn.Module = kind(target, adapter_name, config=lora_config, **kwargs)
        return layer

    return create_new_module


def _time_features_to_save(model: Any, time: TimeFeaturesSchema) -> TimeFeaturesSchema:
    """Return the schema of a model's time features in the file.

    Where LoRAs were fused into time projections, the features are no longer the sums that a table of low rank holds.
    """
    lookup = getattr(model, "time_proj", None)
    branches = [module for module in model.modules() if isinstance(module, TimeFeatureSlice) and module.branch_rank]
    return replace(time, rank=lookup.rank if isinstance(lookup, LowRankTimeFeatures) and not branches else 0)


def prepare_saving(model: Any) -> None:
    """Write the ranks of all branches into a packed model's config; warn of adapters that will not be saved."""
    ranks, unfused = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            ranks[name.replace(".base_layer", "")] = module.branch_rank
        elif isinstance(module, BaseTunerLayer):
            present = set(PEFT_ADAPTERS.require(module)())
            unfused |= present.intersection(module.active_adapters).difference(module.merged_adapters)
    config = model.hf_quantizer.quantization_config
    config.schema = config.schema.with_branch_ranks(ranks)
    config.schema = config.schema.with_time_features(_time_features_to_save(model, config.schema.time_features))
    if unfused:
        logger.warning(
            f"The model is saved without its adapters {', '.join(sorted(unfused))}: save them by "
            "`save_lora_weights`, or call `fuse_lora()` first to save them in the model."
        )
