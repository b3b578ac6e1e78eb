"""Attention of diffusers' models beside packed layers that compute in integers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from ..ops.attention import attention
from ..ops.dispatch import why_no_bf16_attention


class BFloat16AttnProcessor(AttnProcessor2_0):
    """`AttnProcessor2_0` by `ops.attention.attention`. Calls with an attention mask go through the original."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if attention_mask is not None or hidden_states.ndim != 3:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        output = attention(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](output))


def set_attention(model: nn.Module, bf16: bool) -> None:
    """Give attention modules the processor for bf16 dot products, or diffusers' own back.

    Modules with a processor of another kind, or with more than projections around their attention (norms, residuals),
    keep theirs.
    """
    old, new = (AttnProcessor2_0, BFloat16AttnProcessor) if bf16 else (BFloat16AttnProcessor, AttnProcessor2_0)
    for module in model.modules():
        if isinstance(module, Attention) and type(module.processor) is old and _is_plain(module):
            module.set_processor(new())


def attention_kernels(model: nn.Module) -> dict[str, str]:
    """How each attention module computes, and why, by name; those that have another processor are not named."""
    return {
        name: _kernel(next(module.parameters()).device)
        for name, module in model.named_modules()
        if isinstance(module, Attention) and type(module.processor) is BFloat16AttnProcessor
    }


def _is_plain(attn: Attention) -> bool:
    norms = attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross
    return not any(norms) and not attn.residual_connection and attn.rescale_output_factor == 1.0


def _kernel(device: torch.device) -> str:
    obstacle = why_no_bf16_attention(device)
    return "by bf16 dot products in compiled C" if obstacle is None else f"by torch: {obstacle}"
