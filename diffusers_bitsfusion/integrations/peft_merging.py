"""Merging PEFT's adapters into the low-rank branch of a packed layer, and taking them out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..nn import PackedWeight
from ..nn.low_rank_branch import LowRankBranch
from ..nn.packed import from_float_bits
from ..utils.mixins import PutBefore, with_mixin
from ..utils.private_names import PEFT_ADAPTERS
from .peft_folding import by_rows, low_rank_factors

# Modules of PEFT's tuners, beside LoRA, that merge by adding `get_delta_weight(adapter)`, which does not depend on the
# base weight. Whether it has a low rank depends on the adapter.
_ADDING = (
    "adalora", "c3a", "delora", "fourierft", "gralora", "loha", "lokr", "pvera", "randlora", "unilora", "vblora",
    "vera", "waveft",
)  # fmt: skip


if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer as _Base  # The classes that it is mixed into extend it.
else:
    _Base = nn.Module  # So that instances of PEFT's classes can become ones of classes with it.


class MergesIntoBranch(_Base):
    """Mixin of PEFT's layers on packed weights.

    PEFT merges by adding to `base_layer.weight.data`, which a decoded weight refuses. Here merging extends the
    low-rank branch of the packed layer, and unmerging shortens it again. On a layer that is not packed (any more), the
    methods are PEFT's.
    """

    _unmerged_rank = 0
    # Scales and `branch_up` of the base layer before a DoRA was merged.
    _unmerged_rows: tuple[Tensor, Tensor | None] | None = None
    _unmerged_bias: Tensor | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters, times their scaling, into the packed layer's branch; a DoRA multiplies its scales, too.

        Args:
            safe_merge: whether to refuse adapters with NaN or infinite values.
            adapter_names: names of adapters; the active ones when None.

        Raises:
            ValueError: an adapter cannot be folded (see `check_foldable`) or, with `safe_merge`, is not finite.
                Nothing has been merged then.
        """
        base = self.get_base_layer()
        if not isinstance(base, LowRankBranch):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        present = PEFT_ADAPTERS.require(self)()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in present]
        if not names:
            return
        self.check_foldable(names, finite=safe_merge)
        # A DoRA's factors are of the weight into which nothing is merged.
        names = [*self.merged_adapters, *names]
        if self.merged:
            self._unmerge(base)
        self._unmerged_rank = base.branch_rank
        down, up, factor = self._fold(names)
        if factor is not None:
            self._multiply_rows(base, factor)
        base.extend_branch(down, up)
        self._add_to_bias(base, [bias for name in names if (bias := self._added_bias(name)) is not None])
        self.merged_adapters.extend(names)

    def _add_to_bias(self, base: Any, biases: list[Tensor]) -> None:
        if biases:
            self._unmerged_bias = base.bias.data
            base.bias.data = base.bias.data + torch.stack(biases).sum(0).to(base.bias)

    def _multiply_rows(self, base: Any, factor: Tensor) -> None:
        self._unmerged_rows = scale, up = from_float_bits(base.scale), base.branch_up
        base.set_rows(scale * factor, None if up is None else up * by_rows(factor, up))

    def unmerge(self) -> None:
        """Remove all merged adapters from the packed layer, which is then as before, bit for bit."""
        base = self.get_base_layer()
        if not isinstance(base, LowRankBranch):
            super().unmerge()
        elif not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        else:
            self._unmerge(base)

    def _unmerge(self, base: Any) -> None:
        if base.branch_rank > self._unmerged_rank:
            base.shrink_branch(self._unmerged_rank)
        if self._unmerged_rows is not None:
            base.set_rows(*self._unmerged_rows)
            self._unmerged_rows = None
        if self._unmerged_bias is not None:
            base.bias.data, self._unmerged_bias = self._unmerged_bias, None
        self.merged_adapters.clear()

    def check_foldable(self, adapter_names: Iterable[str], finite: bool = False) -> None:
        """Refuse adapters that are more than a low-rank addition to the weight and, of DoRA, factors of its rows.

        Args:
            adapter_names: names of adapters; those that this layer lacks are ignored.
            finite: whether to refuse NaN and infinite values, too.

        Raises:
            ValueError: an adapter changes the weight otherwise, or has a bias that the layer lacks; a DoRA's
                magnitude is not positive and finite; the convolution has groups; the weights are offloaded; or values
                are not finite.
        """
        base: Any = self.get_base_layer()
        present = PEFT_ADAPTERS.require(self)()
        own = [part for name, part in self.named_parameters() if not name.startswith("base_layer.")]
        for name in adapter_names:
            if name not in present:
                continue
            if getattr(base, "groups", 1) > 1:
                reason: str | None = f"a convolution of {base.groups} groups has no low-rank branch"
            elif any(part.is_meta for part in (*base.parameters(), *own)):
                reason = "the weights are offloaded; fuse before offloading"
            elif finite and not all(torch.isfinite(change).all() for change in self._changes(name)):
                raise ValueError(f"The adapters {name} hold NaN or infinite values; they were not merged.")
            else:
                reason = self._why_not_mergeable(name)
            if reason is not None:
                raise ValueError(
                    f"The adapter {name!r} cannot be fused into packed weights: {reason}. It works unfused, and can "
                    "be fused after `dequantize()`."
                )

    def _fold(self, names: list[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return down, up and the factor of the rows, or None, as `peft_folding.fold` does."""
        raise NotImplementedError

    def _why_not_mergeable(self, name: str) -> str | None:
        raise NotImplementedError

    def _changes(self, name: str) -> Iterator[Tensor]:
        """Return what an adapter adds to the weight, or its factors, and to the bias."""
        raise NotImplementedError

    def _added_bias(self, name: str) -> Tensor | None:
        return None


class AddsDelta(PutBefore, MergesIntoBranch):
    """Mixin of PEFT's layers that add `get_delta_weight(adapter)` to the weight."""

    def _fold(self, names: list[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        downs, ups = zip(*(self._factors(name) or () for name in names), strict=True)
        return torch.cat(downs), torch.cat(ups, dim=1), None

    def _factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        (delta,) = self._changes(name)
        return low_rank_factors(delta)

    def _why_not_mergeable(self, name: str) -> str | None:
        if self._factors(name) is None:
            return "what it adds to the weight has no low rank"
        return None

    def _changes(self, name: str) -> Iterator[Tensor]:
        layer: Any = self  # PEFT's class has the method.
        with torch.no_grad():
            yield layer.get_delta_weight(name)


def tuner_of(layer: BaseTunerLayer) -> str:
    """Return the name of the tuner of PEFT that a layer is of, as its module is called."""
    return type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]


def let_merge(model: nn.Module) -> None:
    """Give PEFT's layers on packed layers, whose change of the weight is an addition, the merging of this file."""
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, MergesIntoBranch):
            continue
        if tuner_of(module) in _ADDING and isinstance(module.get_base_layer(), PackedWeight):
            plain: Any = type(module)
            module.__class__ = with_mixin(AddsDelta, plain)
