"""Attention of diffusers' models around packed layers, by the compiled loop of bf16 dot products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from ..ops.attention import attention
from ..ops.dispatch import why_no_bf16_attention


class BFloat16Attention(Attention):
    """`Attention` that computes by `ops.attention.attention` what `AttnProcessor2_0` would compute in torch.

    Its processor stays diffusers' own, so that whatever looks at processors or changes them works. With another
    processor, with a mask or other arguments, and on other devices than a CPU, it is `Attention`.

    Attributes:
        any_dtype (`bool`): whether queries of every dtype are rounded to bf16, as beside layers that compute in
            integers; only those that are in bf16 otherwise.
    """

    any_dtype: bool

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """[batch, tokens, channels] to the same, as of `Attention`."""
        stock = type(self.processor) is AttnProcessor2_0 and attention_mask is None and not cross_attention_kwargs
        if not stock or hidden_states.ndim != 3 or hidden_states.device.type != "cpu":
            others = encoder_hidden_states, attention_mask
            stock_output: Tensor = super().forward(hidden_states, *others, **cross_attention_kwargs)
            return stock_output
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = self.to_q(hidden_states), self.to_k(context), self.to_v(context)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)
        rounded = self.any_dtype or query.dtype == torch.bfloat16
        output = (attention if rounded else F.scaled_dot_product_attention)(query, key, value)
        projection, dropout = self.to_out
        projected_output: Tensor = dropout(projection(output.transpose(1, 2).flatten(2)))
        return projected_output


def set_attention(model: nn.Module, any_dtype: bool) -> None:
    """Make every `Attention` a `BFloat16Attention`.

    Modules of other classes, and those with more than projections around their attention (norms, residuals), are left
    alone.
    """
    for module in model.modules():
        if type(module) is Attention and _is_plain(module):
            module.__class__ = BFloat16Attention
        if type(module) is BFloat16Attention:
            module.any_dtype = any_dtype


def restore_attention(model: nn.Module) -> None:
    """Undo `set_attention`."""
    for module in model.modules():
        if type(module) is BFloat16Attention:
            del module.any_dtype
            module.__class__ = Attention


def attention_kernels(model: nn.Module) -> dict[str, str]:
    """How each attention module computes, and why, by name; those that have another processor are not named."""
    return {
        name: _kernel(module)
        for name, module in model.named_modules()
        if type(module) is BFloat16Attention and type(module.processor) is AttnProcessor2_0
    }


def _is_plain(attn: Attention) -> bool:
    norms = attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross
    return not any(norms) and not attn.residual_connection and attn.rescale_output_factor == 1.0


def _kernel(attn: BFloat16Attention) -> str:
    obstacle = why_no_bf16_attention(next(attn.parameters()).device)
    if obstacle is not None:
        return f"by torch: {obstacle}"
    inputs = "" if attn.any_dtype else " where its inputs are bf16, else by torch: exact calls round no more than that"
    return f"by bf16 dot products in compiled C{inputs}"
