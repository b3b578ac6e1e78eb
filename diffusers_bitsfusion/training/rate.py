"""A price for the bytes of codes in training: the entropy of each layer's codes, added to the loss.

The file is entropy coded, so codes of low entropy take few bytes. Entropy regularisation of quantized weights is
BackSlash's (arXiv 2504.16968) and EntQuant's (arXiv 2601.22787); the BitsFusion paper does not have it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..codec.grid import code_range, half_range
from ..nn.fake_quantized import LEAST_SCALE, FakeQuantizedWeight
from .batches import Batch
from .loop import Objective
from .losses import Loss


class _Entropy(torch.autograd.Function):
    """Bits of a layer's codes by the soft histogram of its latent weights, each shared by its two nearest levels."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, bits: int, balance: bool) -> Tensor:
        low, high = code_range(bits, balance)
        step = scale.clamp_min(LEAST_SCALE).unsqueeze(1)
        values = weight.flatten(1) / step
        below = values.floor().clamp_(low, high - 1)
        above = (values - below).clamp_(0, 1)
        index = (below - low).long()
        counts = torch.zeros(high - low + 1, dtype=torch.float64, device=weight.device)
        counts.index_add_(0, index.flatten(), (1 - above).flatten().double())
        counts.index_add_(0, index.flatten() + 1, above.flatten().double())
        # A level that no weight is near has no price.
        prices = -(counts / weight.numel()).clamp_min(1 / (2 * weight.numel())).log2()
        slope = prices.diff().to(weight.dtype)[index]
        slope = torch.where((values > low) & (values < high), slope, 0.0) / step
        ctx.save_for_backward(slope.view_as(weight), (slope * values).sum(dim=1))
        ctx.damping = math.sqrt(values.shape[1] * half_range(bits))
        return (counts * prices).sum().to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        of_weight, of_scale = ctx.saved_tensors
        return grad * of_weight, -grad * of_scale / ctx.damping, None, None


def codes_entropy(layer: FakeQuantizedWeight) -> Tensor:
    """Return the bits that a layer's codes take, differentiable in its latent weight and its scale.

    Each weight counts at the two levels around it by its distance from them, so that the entropy has a gradient: what
    the one level costs more than the other. The gradient of the scale is divided as LSQ divides that of the error
    (`nn.fake_quantized.straight_through`), so that the two stay in proportion.

    Args:
        layer: fake-quantized layer.

    Returns:
        Bits of all its weights, a scalar.
    """
    bits: Tensor = _Entropy.apply(layer.weight, layer.rounded_scale, layer.bits, layer.balance)  # type: ignore[no-untyped-call]
    return bits


@torch.no_grad()
def rounded_entropy(layer: FakeQuantizedWeight) -> Tensor:
    """Return the bits that a layer's codes take as they are rounded now, a scalar."""
    codes = layer.codes_and_scale()[0].flatten()
    shares = torch.bincount((codes - codes.min()).long()).double() / codes.numel()
    bits: Tensor = torch.special.entr(shares).sum().to(layer.weight.dtype) * (codes.numel() / math.log(2))
    return bits


class PricedCodes:
    """Objective with a price of the codes' bits: its loss + weight · max(bits a weight − free, 0).

    The bits are those of the codes as they are rounded now, and their gradient is that of `codes_entropy`. With a
    price above that of a bit at the optimum, training ends at `free` bits, and pays for none of them: an exact
    penalty, which needs no state beside the model.

    Args:
        objective: objective to which the price is added.
        student: model in training, unwrapped, whose fake-quantized layers count.
        weight: price of a bit a weight.
        free: bits a weight that have no price.
    """

    def __init__(self, objective: Objective, student: nn.Module, weight: float, free: float = 0.0) -> None:
        self.objective, self.weight, self.free = objective, weight, free
        self._layers = [module for module in student.modules() if isinstance(module, FakeQuantizedWeight)]
        self._count = sum(layer.weight.numel() for layer in self._layers)

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of `model`, the student as accelerate has prepared it."""
        loss = self.objective(model, batch)
        shared, rate = (
            torch.stack([entropy(layer) for layer in self._layers]).sum() / self._count
            for entropy in (codes_entropy, rounded_entropy)
        )
        paid = (rate - self.free + shared - shared.detach()).clamp_min(0)
        return Loss(loss.total + self.weight * paid, loss.parts | {"bits": rate})

    def close(self) -> None:
        """Undo what the objective has changed on models."""
        self.objective.close()
