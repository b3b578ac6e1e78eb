"""Integer products of tokens and codes in Triton, for GPUs. Imported where Triton is installed only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int8_product import BLOCK_K, STAGES, load_operands, store_scaled, tile_of, warps


@triton.jit
def _linear_kernel(
    x,
    weight,
    out,
    token_scale,
    weight_scale,
    bias,
    tokens,
    outputs,
    inputs,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute out[m, n] = token_scale[m] * weight_scale[n] * sum_k x[m, k] weight[n, k] + bias[n].

    The inputs are whole blocks if WHOLE.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_place = x + (row % tokens)[:, None].to(tl.int64) * inputs + k[None, :]
    b_place = weight + (column % outputs)[None, :].to(tl.int64) * inputs + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, inputs, BLOCK_K):
        a, b = load_operands(a_place + start, b_place + start, k, inputs - start, WHOLE)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    scales = tl.load(token_scale + row, mask=row < tokens, other=0.0)[:, None]
    store_scaled(out, sums, scales, weight_scale, bias, row, column, tokens, outputs, outputs, HAS_BIAS)


def linear_triton(
    tokens: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the product of codes, scaled.

    Args:
        tokens: int8 [M, in], contiguous.
        token_scale: fp32 [M].
        weight: int8 [out, in], contiguous.
        weight_scale: fp32 [out].
        bias: floating [out].
        dtype: of the output.

    Returns:
        [M, out].
    """
    (rows, inputs), outputs = tokens.shape, weight.shape[0]
    out = torch.empty(rows, outputs, dtype=dtype, device=tokens.device)
    if rows == 0:
        return out
    whole = inputs % BLOCK_K == 0
    block_m, block_n = tile = tile_of(rows, outputs, 1, whole, tokens.device)
    with torch.cuda.device_of(tokens):  # Triton launches on the current device.
        _linear_kernel[(triton.cdiv(rows, block_m), triton.cdiv(outputs, block_n))](
            tokens,
            weight,
            out,
            token_scale,
            weight_scale,
            weight_scale if bias is None else bias.contiguous(),
            rows,
            outputs,
            inputs,
            HAS_BIAS=bias is not None,
            WHOLE=whole,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=BLOCK_K,
            num_warps=warps(tile),
            num_stages=STAGES,
        )
    return out
