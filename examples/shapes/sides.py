"""Cross-attention taught where to look: a place in the image at the token that names the shape on its side.

Nothing else tells the UNet at first that a place on the left and the token of the left side belong together: as long
as queries do not know their place, the token is of no use, and as long as it is of no use, queries need not know their
place. Supervised attention maps are the idea of TokenCompose (arXiv 2312.03626).
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .text import MAX_LENGTH, SIDES


def relation_axes(captions: list[str]) -> Tensor:
    """(n,) int64: 0 for captions without a relation, 1 for those of left and right, 2 for above and below."""
    axes = torch.zeros(len(captions), dtype=torch.int64)
    for index, caption in enumerate(captions):
        words = set(caption.split())
        axes[index] = 1 if words & {"left", "right"} else 2 if words & {"above", "below"} else 0
    return axes


class SideAttention:
    """Watches the first head of every cross-attention of `unet` in training, where the caption has a relation."""

    def __init__(self, unet: UNet2DConditionModel):
        self._axes = torch.zeros(0, dtype=torch.int64)
        self._losses: list[Tensor] = []
        for name, module in unet.named_modules():
            if name.endswith("attn2"):
                module.register_forward_pre_hook(self._watch, with_kwargs=True)

    def expect(self, axes: Tensor) -> None:
        """Say before a forward pass which relations its samples have: (batch,) as `relation_axes`."""
        self._axes, self._losses = axes, []

    def loss(self) -> Tensor:
        """Cross-entropy of the watched attention in the forward pass since `expect`, mean over layers and places."""
        return torch.stack(self._losses).mean()

    def _watch(self, attention: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        if not torch.is_grad_enabled():
            return
        (hidden,), states = args, kwargs["encoder_hidden_states"]
        width = attention.to_q.out_features // attention.heads
        query = F.linear(hidden, attention.to_q.weight[:width])
        key = F.linear(states, attention.to_k.weight[:width])
        scores = (query @ key.transpose(1, 2)).float() * attention.scale
        targets = _targets(int(hidden.shape[1] ** 0.5), hidden.device)[self._axes]
        errors = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        related = (self._axes > 0).float()
        self._losses.append((errors.mean(dim=1) * related).sum() / related.sum().clamp(min=1))


def _targets(side: int, device: torch.device) -> Tensor:
    """(3, side * side) int64: the token of each place's side, by the relation's axis; unused without one."""
    second = (torch.arange(side, device=device) >= side // 2).long().expand(side, side)
    first_token = MAX_LENGTH - len(SIDES)
    return first_token + torch.stack([torch.zeros_like(second).flatten(), second.flatten(), 2 + second.T.flatten()])
