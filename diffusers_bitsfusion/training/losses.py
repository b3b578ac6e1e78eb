"""What is minimised: distillation from the teacher in Stage I, noise prediction in Stage II (paper, section 6)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn

from .batches import Batch


@dataclass
class Loss:
    """One batch's loss.

    Attributes:
        total: scalar to minimise.
        parts: its detached parts by name, for the log.
    """

    total: Tensor
    parts: dict[str, Tensor]


class BlockFeatures:
    """Reads the outputs of a UNet's down and up blocks by forward hooks.

    Raises:
        ValueError: the model has no such blocks.
    """

    def __init__(self, unet: Any):
        if not hasattr(unet, "down_blocks") or not hasattr(unet, "up_blocks"):
            raise ValueError(
                f"{type(unet).__name__} has no down and up blocks to distil features of; use a feature weight of 0."
            )
        self._features: list[Tensor] | None = None
        blocks = [*unet.down_blocks, *unet.up_blocks]
        self._hooks = [block.register_forward_hook(self._take) for block in blocks]

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Within it, a call of the model fills the list: [batch, channels, height, width] of each block in order."""
        features: list[Tensor] = []
        self._features = features
        try:
            yield features
        finally:
            self._features = None

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, block: nn.Module, arguments: Any, output: Tensor | tuple[Tensor, Any]) -> None:
        if self._features is not None:
            # A down block returns its hidden states and those for the skip connections.
            self._features.append(output[0] if isinstance(output, tuple) else output)


class Distillation:
    """Stage I: L_noise + feature_weight * L_feat, both mean squared errors against the teacher on the same input.

    L_feat is summed over blocks. Models that predict v or the sample are distilled in that.

    Args:
        student: the model in training, unwrapped; its blocks get hooks.
        teacher: the full-precision model, in any dtype.
        feature_weight: lambda of the paper; 0 leaves features out.
    """

    def __init__(self, student: ModelMixin, teacher: ModelMixin, feature_weight: float = 0.01):
        self.teacher = teacher
        self.feature_weight = feature_weight
        self._features = [BlockFeatures(student), BlockFeatures(teacher)] if feature_weight else []

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of `model`, the student as prepared by accelerate."""
        if not self._features:
            target, prediction = self._teach(batch), _predict(model, batch)
            noise = F.mse_loss(prediction.float(), target.float())
            return Loss(noise, {"noise": noise.detach()})
        of_student, of_teacher = self._features
        with of_teacher.recording() as theirs:
            target = self._teach(batch)
        with of_student.recording() as ours:
            prediction = _predict(model, batch)
        noise = F.mse_loss(prediction.float(), target.float())
        feature = torch.stack([F.mse_loss(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]).sum()
        total = noise + self.feature_weight * feature
        return Loss(total, {"noise": noise.detach(), "feature": feature.detach()})

    def close(self) -> None:
        """Take the hooks off both models."""
        for features in self._features:
            features.remove()

    @torch.no_grad()
    def _teach(self, batch: Batch) -> Tensor:
        return predict(self.teacher, batch.noisy, batch.timesteps, batch.states)


class NoisePrediction:
    """Stage II: mean squared error against what the model is to predict (noise, v or sample), known from the data."""

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of `model`, the student as prepared by accelerate."""
        loss = F.mse_loss(_predict(model, batch).float(), batch.target.float())
        return Loss(loss, {"noise": loss.detach()})

    def close(self) -> None:
        """Nothing to undo."""


def predict(model: ModelMixin, noisy: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
    """The prediction of a frozen model, computed in its own dtype."""
    return model(noisy.to(model.dtype), timesteps, states.to(model.dtype), return_dict=False)[0]


def _predict(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch.noisy, batch.timesteps, batch.states.to(batch.noisy.dtype), return_dict=False)[0]
