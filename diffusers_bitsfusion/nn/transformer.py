"""`Transformer2DModel` of diffusers without copies between memory formats."""

from __future__ import annotations

import torch
from diffusers.models.transformers import transformer_2d
from torch import Tensor, nn


class Transformer2DModel(transformer_2d.Transformer2DModel):
    """diffusers' class of this name; its tokens become an image as they lie where its input is channels last, bf16.

    diffusers copies them to contiguous memory, from which packed convolutions in bf16 copy them back.
    """

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        is_kept = residual.dtype == torch.bfloat16 and residual.is_contiguous(memory_format=torch.channels_last)
        if not is_kept:
            copied: Tensor = super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
            return copied
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        image = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            image = self.proj_out(image)
        return image + residual


def set_channels_last(model: nn.Module, channels_last: bool) -> None:
    """Give every `Transformer2DModel` within a model the class of this file, or diffusers' own back."""
    old, new = transformer_2d.Transformer2DModel, Transformer2DModel
    if not channels_last:
        old, new = new, old
    for module in model.modules():
        if type(module) is old and module is not model:  # A model's own class is that of its file.
            module.__class__ = new
