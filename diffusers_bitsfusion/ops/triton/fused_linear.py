"""Decoding within the product, in Triton, for the few tokens that one tile of tensor cores holds.

Imported where Triton is installed only. Weights never reach memory: they are read as codes, once, which is all that
such a product waits for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...native.dense_form import DENSE_FORMS
from ..dispatch import FEW_TOKENS
from .decode import dense_form, last_digit, load_words

# Outputs of a program, few so that there are many programs, and words that it decodes at a time.
_OUTPUTS, _WORDS = 16, 64


@triton.jit(do_not_specialize=["tokens", "columns", "width", "row_bytes"])
def _linear_kernel(
    x,
    dense,
    scale,
    bias,
    out,
    tokens,
    outputs,
    columns,
    width,
    row_bytes,
    HAS_BIAS: tl.constexpr,
    WORD_BITS: tl.constexpr,
    BASE: tl.constexpr,
    HALF: tl.constexpr,
    PLANES: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Compute out[m, n] = scale[n] * sum_k x[m, k] code[n, k] + bias[n]."""
    row = tl.arange(0, BLOCK_M)[:, None]
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dense += column[:, None].to(tl.int64) * row_bytes
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, width, WORDS):
        index = first + tl.arange(0, WORDS)[None, :]
        mask = (column[:, None] < outputs) & (index < width)
        words = load_words(dense, index, mask, first + WORDS - 1, width, WORD_BITS)
        for plane in tl.static_range(PLANES):
            digit, words = last_digit(words, BASE, RECIPROCAL, SHIFT)
            k = plane * width + index
            inside = (row < tokens) & (index < width) & (k < columns)
            a = tl.load(x + row * columns + k, mask=inside, other=0.0)
            codes = (digit.to(tl.int32) - HALF).to(x.dtype.element_ty)  # Codes are small integers, which are exact.
            sums = tl.dot(a, tl.trans(codes), sums)
    y = sums * tl.load(scale + column, mask=column < outputs, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    inside = (row < tokens) & (column[None, :] < outputs)
    tl.store(out + row * outputs + column[None, :], y.to(out.dtype.element_ty), mask=inside)


def linear_fused(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """Compute x W^T + b.

    Args:
        x: fp16 or bf16 [M, in], M up to `FEW_TOKENS`.
        codes: uint8 [out, dense_width(in, bits)].
        scale: fp32 [out].
        bias: floating [out].
        bits: 1 to 8.

    Returns:
        [M, out] in the dtype of `x`: the sums are scaled in fp32 and rounded once, where decoding rounds each weight.
    """
    (tokens, columns), outputs = x.shape, len(codes)
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device.
        _linear_kernel[(triton.cdiv(outputs, _OUTPUTS),)](
            x.contiguous(),
            codes.contiguous(),
            scale.contiguous(),
            scale if bias is None else bias.contiguous(),
            out,
            tokens,
            outputs,
            columns,
            DENSE_FORMS[bits].words(columns),
            codes.shape[1],
            HAS_BIAS=bias is not None,
            **dense_form(bits),
            BLOCK_M=FEW_TOKENS,
            BLOCK_N=_OUTPUTS,
            WORDS=_WORDS,
            num_warps=2,
        )
    return out
