"""Activations to eight bits and integer sums back to outputs: plain references and compiled loops.

GPUs have `triton/activations.py`. All of them give the same codes and scales, bit for bit. NaN or infinite activations
give NaN scales or outputs. Every buffer names its dtype: torch's default one may change meanwhile, since loading a
model sets it for the whole process.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..native.arguments import AffineArguments, GegluArguments, RangeArguments, RescaleArguments, TokenArguments
from ..native.library import NATIVE_DTYPES, Loop, NativeLibrary, native_library
from .kernels import ROUND_COMPILED

# Smallest range of values that is not treated as zero; its reciprocal is finite.
TINY = 1e-30

# Values that the compiled loops over whole tensors process at a time.
_CHUNK = 1 << 14


def quantize_tokens_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return symmetric codes with a scale for each token, `x ≈ scale * codes`.

    Args:
        x: floating [tokens, channels].

    Returns:
        codes int8 [tokens, channels], -127 to 127; scale fp32 [tokens], a 127th of the token's largest magnitude.
    """
    x = x.to(torch.float32)
    span = torch.linalg.vector_norm(x, ord=torch.inf, dim=1, keepdim=True).clamp(min=TINY)
    codes = (x * (torch.full_like(span, 127.0) / span)).round_().clamp_(-127, 127).to(torch.int8)
    return codes, span.squeeze(1).div_(127.0)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize as `quantize_tokens_reference` by the fastest kernel on a CPU."""
    native = _native_for(x)
    if native is None:
        return quantize_tokens_reference(x)
    x = _loadable(x).contiguous()
    rows, columns = x.shape
    codes, scale = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, dtype=torch.float32)
    arguments = TokenArguments(
        x=x.data_ptr(),
        codes=codes.data_ptr(),
        scale=scale.data_ptr(),
        columns=columns,
        dtype=NATIVE_DTYPES[x.dtype],
    )
    native.quantize_tokens(rows, columns, arguments)
    return codes, scale


def quantize_image_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes with one scale and zero point for the whole tensor, `x ≈ scale * (codes - zero_point)`.

    Zero is always exact, so that a convolution's padding is.

    Args:
        x: floating, at least one value.

    Returns:
        codes uint8 of the shape and strides of `x`; scale fp32 [1]; zero_point int32 [1].
    """
    x = x.to(torch.float32)
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale, inverse, zero_point = _affine(low, high)
    codes = (x * inverse).round_().add_(zero_point).clamp_(0, 255).to(torch.uint8)
    return codes, scale.view(1), zero_point.to(torch.int32).view(1)


def quantize_image(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize as `quantize_image_reference` by the fastest kernel on a CPU."""
    native = _native_for(x)
    if native is None:
        return quantize_image_reference(x)
    x = _loadable(x)
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    chunks = -(-x.numel() // _CHUNK)
    sizes = {"count": x.numel(), "chunk": _CHUNK, "dtype": NATIVE_DTYPES[x.dtype]}
    bounds = torch.empty(chunks, 2, dtype=torch.float32)
    native.range(chunks, _CHUNK, RangeArguments(x=x.data_ptr(), bounds=bounds.data_ptr(), **sizes))
    scale, inverse, zero_point = _affine(bounds[:, 0].amin(), bounds[:, 1].amax())
    codes = torch.empty_like(x, dtype=torch.uint8)
    arguments = AffineArguments(
        x=x.data_ptr(),
        codes=codes.data_ptr(),
        inverse=inverse.data_ptr(),
        zero_point=zero_point.data_ptr(),
        **sizes,
    )
    native.quantize_affine(chunks, _CHUNK, arguments)
    return codes, scale.view(1), zero_point.to(torch.int32).view(1)


def _affine(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (scale, its inverse, zero point), fp32 scalars, that map `low` ... `high` to 0 ... 255."""
    span = (high - low).clamp(min=TINY)
    inverse = torch.full_like(span, 255.0) / span  # torch rounds 255.0 / span twice.
    return span / 255.0, inverse, (-low * inverse).round_()


def rescale_reference(
    sums: Tensor, token_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor
) -> Tensor:
    """Return outputs from sums of products of codes, in fp32 and rounded once.

    Args:
        sums: int32 [tokens, channels].
        token_scale: fp32 [tokens].
        weight_scale: fp32 [channels].
        bias: floating [channels].
        out: floating [tokens, channels], written and returned.
    """
    y = sums.to(torch.float32).mul_(weight_scale).mul_(token_scale.unsqueeze(1))
    return out.copy_(y if bias is None else y.add_(bias))


def rescale(sums: Tensor, token_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Rescale as `rescale_reference` by the fastest kernel; the order of its products may differ in the last bit."""
    native = _native_for(sums)
    if native is None:
        return rescale_reference(sums, token_scale, weight_scale, bias, out)
    return _rescale_rows(native.rescale, sums, token_scale, weight_scale, bias, out)


def rescale_geglu_reference(
    sums: Tensor, token_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor
) -> Tensor:
    """Rescale as `rescale_reference`, and return hidden * gelu(gate) of the halves of each token, hidden and gate.

    Args:
        sums: int32 [tokens, 2 * channels].
        token_scale: fp32 [tokens].
        weight_scale: fp32 [2 * channels].
        bias: floating [2 * channels].
        out: floating [tokens, channels], written and returned.
    """
    y = rescale_reference(sums, token_scale, weight_scale, bias, torch.empty_like(sums, dtype=torch.float32))
    hidden, gate = y.chunk(2, dim=1)
    return out.copy_(hidden * F.gelu(gate))


def rescale_geglu(sums: Tensor, token_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Rescale as `rescale_geglu_reference` by the fastest kernel, to 1e-7 of the gate."""
    native = _native_for(sums)
    if native is None:
        return rescale_geglu_reference(sums, token_scale, weight_scale, bias, out)
    return _rescale_rows(native.rescale_geglu, sums, token_scale, weight_scale, bias, out)


def geglu_reference(x: Tensor, out: Tensor) -> Tensor:
    """hidden * gelu(gate), rounded once.

    Args:
        x: floating [tokens, 2 * channels], whose halves are hidden and gate.
        out: floating [tokens, channels], written and returned.
    """
    hidden, gate = x.to(torch.float32).chunk(2, dim=1)
    return out.copy_(hidden * F.gelu(gate))


def geglu(x: Tensor, out: Tensor) -> Tensor:
    """`geglu_reference` by the fastest kernel, to 1e-7 of the gate; both contiguous and of one dtype."""
    native = _native_for(x)
    if native is None or x.dtype not in (torch.float32, torch.bfloat16):
        return geglu_reference(x, out)
    rows, columns = out.shape
    arguments = GegluArguments(x=x.data_ptr(), out=out.data_ptr(), columns=columns, dtype=NATIVE_DTYPES[x.dtype])
    native.geglu(rows, columns, arguments)
    return out


def _rescale_rows(
    loop: Loop[RescaleArguments],
    sums: Tensor,
    token_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> Tensor:
    if out.dtype not in (torch.float32, torch.bfloat16) or not out.is_contiguous():
        plain = torch.empty(out.shape, dtype=torch.float32)
        return out.copy_(_rescale_rows(loop, sums, token_scale, weight_scale, bias, plain))
    rows, columns = sums.shape
    bias = torch.zeros(columns, dtype=torch.float32) if bias is None else bias.to(torch.float32).contiguous()
    weight_scale = weight_scale.contiguous()
    arguments = RescaleArguments(
        sums=sums.data_ptr(),
        token_scale=token_scale.data_ptr(),
        weight_scale=weight_scale.data_ptr(),
        bias=bias.data_ptr(),
        out=out.data_ptr(),
        columns=out.shape[1],
        dtype=NATIVE_DTYPES[out.dtype],
    )
    loop(rows, columns, arguments)
    return out


def _native_for(x: Tensor) -> NativeLibrary | None:
    return native_library() if ROUND_COMPILED.why_not(x.device) is None else None


def _loadable(x: Tensor) -> Tensor:
    return x if x.dtype in NATIVE_DTYPES else x.to(torch.float32)
