"""Attention by bf16 dot products, where the processor has them: what models that compute in integers take."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..native.arguments import AttentionArguments
from ..native.library import NATIVE_DTYPES, native_library
from .dispatch import why_no_bf16_attention
from .transforms import in_transform

# Entries of a head that the compiled loop has room for.
_WIDEST = 256


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query keyᵀ / √width) value; without a mask or dropout.

    Queries, keys, values and unnormalised probabilities are rounded to bf16, sums are fp32: the error that torch's own
    attention has on bf16 tensors. Torch's own runs where a derivative is asked for, and where `why_no_bf16_attention`
    gives a reason.

    Args:
        query: floating [batch, heads, queries, width].
        key, value: [batch, heads, keys, width] in the dtype of `query`.

    Returns:
        [batch, heads, queries, width] in the dtype of `query`, with the strides of a transposed
        [batch, queries, heads, width].
    """
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if gradient or in_transform():
        return F.scaled_dot_product_attention(query, key, value)
    output: Tensor = _attention(query, key, value)
    return output


@torch.library.custom_op("bitsfusion::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if query.shape[-1] > _WIDEST or why_no_bf16_attention(query.device) is not None:
        return _tokens_first(F.scaled_dot_product_attention(query, key, value))
    return _attend(query, key, value).to(query.dtype)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _tokens_first(query)


@register_flop_formula(torch.ops.bitsfusion.attention)
def _(query: torch.Size, key: torch.Size, value: torch.Size, **_: Any) -> int:
    return 2 * query[:-1].numel() * key[2] * (query[-1] + value[-1])


def _tokens_first(x: Tensor) -> Tensor:
    """Return a copy with the strides of a transposed [batch, tokens, heads, width]."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, heads, tokens, width = query.shape
    dtype = torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32
    query, key, value = (x.to(dtype) for x in (query, key, value))
    # The loop takes any strides but that of a head's entries.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty(batch, tokens, heads, width, dtype=dtype).transpose(1, 2)
    native = native_library()
    assert native is not None
    assert native.attention is not None
    units, keys = batch * heads * -(-tokens // native.attention_queries), key.shape[2]
    arguments = AttentionArguments(
        q=query.data_ptr(),
        k=key.data_ptr(),
        v=value.data_ptr(),
        out=out.data_ptr(),
        q_strides=query.stride()[:3],
        k_strides=key.stride()[:3],
        v_strides=value.stride()[:3],
        out_strides=out.stride()[:3],
        heads=heads,
        queries=tokens,
        keys=keys,
        width=width,
        dtype=NATIVE_DTYPES[dtype],
    )
    native.attention(units, native.attention_queries * keys, arguments)
    return out
