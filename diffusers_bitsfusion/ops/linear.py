"""The linear layer on packed weights as one operator: exact or in integers, differentiable in input and bias.

One operator, so that `torch.compile` sees a single node and the decoded weight never leaves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .activations import geglu, quantize_tokens, rescale, rescale_geglu
from .decode import decode_to_scratch, decode_weight
from .dispatch import fuses_decoding, multiplies_blocks
from .kernels import PREPACKED_BF16
from .onednn_float_weights import PackedOperand, prepack_in_place
from .products import MAX_SUMS, block_codes, int_mm

# Tokens that are multiplied at a time at least: with fewer a product waits for its weight, which it reads anew.
_FEWEST_TOKENS = 256

# Tokens for which decoding into oneDNN's layout, which takes longer than into a plain one, costs less than oneDNN's.
_PREPACKED_TOKENS = 1024


@torch.library.custom_op(
    "bitsfusion::linear",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int bits, SymInt[] shape, bool int8, "
        "Tensor? int8_weight) -> Tensor"
    ),
)
def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    shape: Sequence[int],
    int8: bool,
    int8_weight: Tensor | None,
) -> Tensor:
    """y = x W^T + b.

    Args:
        x: floating [..., in].
        codes: uint8 [out, dense_width(in, bits)], the dense form of `codec.radix`.
        scale: int32 [out], the bits of the fp32 scales.
        bias: [out] in the dtype of `x`.
        bits: 1 to 8.
        shape: (out, in).
        int8: whether each token of `x` is rounded to 8 bits, symmetrically, and multiplied in integers. Gradients are
            those of the exact layer.
        int8_weight: what `int8_linear_weight` made of the codes, if that is kept; only looked at with `int8`.

    Returns:
        [..., out] in the dtype of `x`.
    """
    if not int8 and fuses_decoding(x.device, x.dtype, x.shape[:-1].numel()):
        from .triton.fused_linear import linear_fused  # It imports Triton, which takes a second and may be missing.

        y = linear_fused(_tokens(x, shape), codes, scale.view(torch.float32), bias, bits)
        return _shaped(y, (*x.shape[:-1], shape[0]))
    if not int8:
        y = _exact(x, PackedOperand(codes, scale.view(torch.float32), bits, tuple(shape)), bias)
        return _shaped(y, y.shape)
    tokens = _tokens(x, shape)
    weight = _int8_weight(codes, scale, bits, shape, kept=False) if int8_weight is None else int8_weight
    float_scale = scale.view(torch.float32)
    if x.device.type == "cuda":
        y = _multiply_on_gpu(tokens, weight, float_scale, bias)
    else:
        y = _multiply_on_cpu(tokens, weight, bits, float_scale, bias)
    return _shaped(y, (*x.shape[:-1], shape[0]))


def _shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the contiguous `y` in another shape; to autograd no view, since it forbids changing those in place."""
    shaped: Tensor = torch.ops.aten._unsafe_view(y, list(shape))
    return shaped


def _tokens(x: Tensor, shape: Sequence[int]) -> Tensor:
    """[tokens, in], refused in torch's words where the layer has other inputs: the loops do not look at the width."""
    tokens = x.reshape(-1, x.shape[-1])
    if tokens.shape[1] != shape[1]:
        sizes = f"{tokens.shape[0]}x{tokens.shape[1]} and {shape[1]}x{shape[0]}"
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({sizes})")
    return tokens


@torch.library.custom_op(
    "bitsfusion::linear_geglu",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int bits, SymInt[] shape, bool int8, "
        "Tensor? int8_weight) -> Tensor"
    ),
)
def linear_geglu(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    shape: Sequence[int],
    int8: bool,
    int8_weight: Tensor | None,
) -> Tensor:
    """hidden * gelu(gate), the halves of what `linear` gives (arXiv 2002.05202); not differentiable.

    On a CPU the product is made of sums that are still in the processor's cache, and the halves are never written.

    Args: as of `linear`; `shape`: (2 * out, in).

    Returns:
        [..., out] in the dtype of `x`.
    """
    if x.device.type != "cpu":
        product: Tensor = linear(x, codes, scale, bias, bits, shape, int8, int8_weight)
        hidden, gate = product.chunk(2, dim=-1)
        return hidden * F.gelu(gate)
    tokens = _tokens(x, shape)
    if int8:
        weight = _int8_weight(codes, scale, bits, shape, kept=False) if int8_weight is None else int8_weight
        y = _multiply_on_cpu(tokens, weight, bits, scale.view(torch.float32), bias, geglu=True)
    else:
        y = _gated(tokens, PackedOperand(codes, scale.view(torch.float32), bits, tuple(shape)), bias)
    return _shaped(y, (*x.shape[:-1], shape[0] // 2))


def _exact(x: Tensor, packed: PackedOperand, bias: Tensor | None) -> Tensor:
    """Compute the exact layer by the fastest kernel."""
    tokens = x.reshape(-1, x.shape[-1])
    weight = prepack_in_place(packed, tokens) if _takes_layout(tokens, packed) else None
    if weight is not None:
        return _multiply_prepacked(tokens, weight, bias).view(*x.shape[:-1], packed.shape[0])
    decoded = decode_to_scratch(packed.codes, packed.scale, packed.bits, packed.shape, x.dtype)
    return F.linear(x, decoded, bias)


def _takes_layout(tokens: Tensor, packed: PackedOperand) -> bool:
    """Whether oneDNN is given a weight in its own layout, and a valid input, at whose sizes it does not look."""
    fits = len(tokens) >= _PREPACKED_TOKENS and tokens.shape[1] == packed.shape[1] > 0
    return fits and PREPACKED_BF16.why_not(tokens.device, tokens.dtype) is None


def _multiply_prepacked(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(tokens, weight, bias, "none", [], "")
    return y


def _gated(tokens: Tensor, packed: PackedOperand, bias: Tensor | None) -> Tensor:
    """`linear_geglu` in the dtype of the tokens."""
    rows = packed.shape[0]
    out = torch.empty(len(tokens), rows // 2, dtype=tokens.dtype)
    block = max(_FEWEST_TOKENS, MAX_SUMS // rows)
    weight = prepack_in_place(packed, tokens[:block]) if _takes_layout(tokens, packed) else None
    multiply = _multiply_prepacked if weight is not None else F.linear
    if weight is None:
        weight = decode_to_scratch(packed.codes, packed.scale, packed.bits, packed.shape, tokens.dtype)
    for start in range(0, len(tokens), block):
        geglu(multiply(tokens[start : start + block], weight, bias), out[start : start + block])
    return out


@linear_geglu.register_fake
def _(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int, shape: Sequence[int], int8: bool, _: Any
) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0] // 2)


def _multiply_on_cpu(
    x: Tensor, weight: Tensor, bits: int, scale: Tensor, bias: Tensor | None, geglu: bool = False
) -> Tensor:
    tokens, token_scale = quantize_tokens(x)
    rows = len(scale)
    finish, columns = (rescale_geglu, rows // 2) if geglu else (rescale, rows)
    out = torch.empty(len(tokens), columns, dtype=x.dtype)
    block = max(_FEWEST_TOKENS, MAX_SUMS // rows)
    sums = torch.empty(min(block, len(tokens)), rows, dtype=torch.int32)
    for start in range(0, len(tokens), block):
        part = slice(start, start + block)
        finish(int_mm(tokens[part], weight, bits, sums), token_scale[part], scale, bias, out[part])
    return out


def _multiply_on_gpu(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    # It imports Triton, which takes a second and may be missing.
    from .triton.activations import quantize_tokens_triton
    from .triton.int8_linear import linear_triton

    return linear_triton(*quantize_tokens_triton(x.contiguous()), weight, scale, bias, x.dtype)


@linear.register_fake
def _(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int, shape: Sequence[int], int8: bool, _: Any
) -> Tensor:
    return F.linear(x.contiguous() if int8 else x, x.new_empty(shape), bias)


@torch.library.custom_op(
    "bitsfusion::linear_input_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor codes, Tensor scale, int bits, SymInt[] shape) -> Tensor",
)
def linear_input_grad(grad: Tensor, codes: Tensor, scale: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Gradient [..., in] of the exact layer's input; `grad` is that of its output, other arguments as in `linear`."""
    return grad @ _scratch_weight(codes, scale, bits, shape, grad.dtype)


@linear_input_grad.register_fake
def _(grad: Tensor, codes: Tensor, scale: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    return grad @ grad.new_empty(shape)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, ctx.bits, ctx.shape = inputs
    ctx.save_for_backward(codes, scale)


def _second_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the gradient once more: it is linear in that of the output."""
    return linear(grad, *ctx.saved_tensors, None, ctx.bits, ctx.shape, False, None), None, None, None, None


linear_input_grad.register_autograd(_second_backward, setup_context=_setup_second)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, _, ctx.bits, ctx.shape, _, _ = inputs
    ctx.save_for_backward(codes, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = linear_input_grad(grad, *ctx.saved_tensors, ctx.bits, ctx.shape)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, grad_bias, None, None, None, None


linear.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.bitsfusion.linear, torch.ops.bitsfusion.linear_geglu])
def _(
    x: torch.Size, codes: torch.Size, scale: Any, bias: Any, bits: int, shape: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * x.numel() * shape[0]


@register_flop_formula(torch.ops.bitsfusion.linear_input_grad)
def _(grad: torch.Size, codes: torch.Size, scale: torch.Size, bits: int, shape: Sequence[int], **_: Any) -> int:
    return 2 * grad.numel() * shape[1]


def int8_linear_weight(codes: Tensor, scale: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Return the codes as `linear` multiplies them, to be kept; arguments as in `linear`.

    Returns:
        int8 [out, in]; on a CPU without VNNI `products.block_codes`.
    """
    return _int8_weight(codes, scale, bits, shape, kept=True)


def _int8_weight(codes: Tensor, scale: Tensor, bits: int, shape: Sequence[int], kept: bool) -> Tensor:
    if multiplies_blocks(codes.device, bits):
        return block_codes(codes, scale.view(torch.float32), bits, shape, kept)
    decode = decode_weight if kept else decode_to_scratch
    return decode(codes, scale.view(torch.float32), bits, tuple(shape), torch.int8)


def _scratch_weight(codes: Tensor, scale: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return decode_to_scratch(codes, scale.view(torch.float32), bits, tuple(shape), dtype)
