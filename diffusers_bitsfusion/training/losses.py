"""Objectives: distillation from the teacher in Stage I, noise prediction in Stage II (paper, section 6)."""

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
    """Loss of a batch.

    Attributes:
        total: scalar to minimise.
        parts: detached parts of the total by name, for the log.
    """

    total: Tensor
    parts: dict[str, Tensor]


class BlockFeatures:
    """Outputs of a UNet's down and up blocks, read by forward hooks.

    Args:
        unet: model with down and up blocks, which get hooks.

    Raises:
        ValueError: the model has no such blocks.
    """

    def __init__(self, unet: Any) -> None:
        if not hasattr(unet, "down_blocks") or not hasattr(unet, "up_blocks"):
            raise ValueError(
                f"{type(unet).__name__} has no down and up blocks to distil features of; use a feature weight of 0."
            )
        self._features: list[Tensor] | None = None
        blocks = [*unet.down_blocks, *unet.up_blocks]
        self._hooks = [block.register_forward_hook(self._record) for block in blocks]

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Record the outputs of calls within the block.

        Yields:
            List that a call fills with the output of each block in order, [batch, channels, height, width].
        """
        features: list[Tensor] = []
        self._features = features
        try:
            yield features
        finally:
            self._features = None

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _record(self, block: nn.Module, arguments: Any, output: Tensor | tuple[Tensor, Any]) -> None:
        if self._features is not None:
            # A down block returns its hidden states and those of the skip connections.
            self._features.append(output[0] if isinstance(output, tuple) else output)


class Distillation:
    """Objective of Stage I, L_noise + feature_weight * L_feat (paper, section 6).

    Both are mean squared errors against the teacher on the same input; L_feat is summed over blocks. Models that
    predict v or the sample are distilled in that.

    Args:
        student: model in training, unwrapped; its blocks get hooks.
        teacher: full-precision model, in any dtype; its blocks get hooks.
        feature_weight: lambda of the paper; 0 for distillation without features.

    Raises:
        ValueError: a model has no down and up blocks, and `feature_weight` is not 0.
    """

    def __init__(self, student: ModelMixin, teacher: ModelMixin, feature_weight: float = 0.01) -> None:
        self.teacher = teacher
        self.feature_weight = feature_weight
        self._features = [BlockFeatures(student), BlockFeatures(teacher)] if feature_weight else []

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of `model`, the student as accelerate has prepared it."""
        if not self._features:
            target, prediction = self._predict_by_teacher(batch), _predict(model, batch)
            noise = F.mse_loss(prediction.float(), target.float())
            return Loss(noise, {"noise": noise.detach()})
        of_student, of_teacher = self._features
        with of_teacher.recording() as teacher_features:
            target = self._predict_by_teacher(batch)
        with of_student.recording() as student_features:
            prediction = _predict(model, batch)
        noise = F.mse_loss(prediction.float(), target.float())
        pairs = zip(student_features, teacher_features, strict=True)
        feature = torch.stack([F.mse_loss(a.float(), b.float()) for a, b in pairs]).sum()
        total = noise + self.feature_weight * feature
        return Loss(total, {"noise": noise.detach(), "feature": feature.detach()})

    def close(self) -> None:
        """Remove the hooks of both models."""
        for features in self._features:
            features.remove()

    @torch.no_grad()
    def _predict_by_teacher(self, batch: Batch) -> Tensor:
        return predict(self.teacher, batch.noisy, batch.timesteps, batch.states)


class NoisePrediction:
    """Objective of Stage II, the mean squared error against the noise, v or sample of the data (paper, section 6)."""

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of `model`, the student as accelerate has prepared it."""
        loss = F.mse_loss(_predict(model, batch).float(), batch.target.float())
        return Loss(loss, {"noise": loss.detach()})

    def close(self) -> None:
        """Do nothing, since this objective changes no model."""


def predict(model: ModelMixin, noisy: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
    """Return the prediction of a frozen model, computed in its own dtype.

    Args:
        model: model to call.
        noisy: noisy latents, floating [batch, channels, height, width].
        timesteps: int64 [batch].
        states: prompt embeddings, floating [batch, tokens, width].
    """
    prediction: Tensor = model(noisy.to(model.dtype), timesteps, states.to(model.dtype), return_dict=False)[0]
    return prediction


def _predict(model: nn.Module, batch: Batch) -> Tensor:
    states = batch.states.to(batch.noisy.dtype)
    prediction: Tensor = model(batch.noisy, batch.timesteps, states, return_dict=False)[0]
    return prediction
