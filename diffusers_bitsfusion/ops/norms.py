"""Norms of groups of channels with what stands around them in residual blocks: plain reference and compiled loops.

The loops take the sum before the norm and the activation after it in the same pass. Their statistics are no less exact
than torch's: sums over blocks are in double precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..native.arguments import GroupNormArguments
from ..native.library import NATIVE_DTYPES, native_library
from .dispatch import why_no_compiled_norm
from .transforms import in_transform

# Positions of an image that is channels last that the loops process at a time.
_BLOCK = 64


def group_norm_reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None
) -> Tensor:
    """Return silu(the norm of x + shift) as diffusers computes it, in three operations of torch.

    Args:
        x: floating [batch, channels, ...].
        groups: number of groups of channels.
        weight, bias: floating [channels].
        eps: added to the variance.
        silu: whether the activation follows.
        shift: [batch, channels] in the dtype of `x`; None for nothing.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    if shift is not None:
        x = x + shift[(...,) + (None,) * (x.dim() - 2)]
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False, shift: Tensor | None = None
) -> Tensor:
    """Compute `group_norm_reference` by the fastest kernel.

    Torch computes where a derivative is asked for, within autocast and in compiled models, whose compiler fuses by
    itself, and where `why_no_compiled_norm` gives a reason. The result has the memory format of `x`.
    """
    tensors = [t for t in (x, weight, bias, shift) if t is not None]
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if torch.compiler.is_compiling() or gradient or in_transform() or not _fits(x, groups, weight, bias, shift):
        return group_norm_reference(x, groups, weight, bias, eps, silu, shift)
    output: Tensor = _group_norm(x, groups, weight, bias, eps, silu, shift)
    return output


def _fits(x: Tensor, groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None) -> bool:
    """Whether a kernel may be given such an input, which is valid: the loops do not look at sizes."""
    if x.dim() < 2 or x.numel() == 0 or why_no_compiled_norm(x.device, x.dtype, x.shape[1], groups) is not None:
        return False
    valid = x.shape[1] % groups == 0 and weight.shape == bias.shape == x.shape[1:2]
    added = shift is None or (shift.shape == x.shape[:2] and shift.dtype == x.dtype)
    return valid and added and not torch.is_autocast_enabled(x.device.type)


@torch.library.custom_op(
    "bitsfusion::group_norm",
    mutates_args=(),
    schema=("(Tensor x, int groups, Tensor weight, Tensor bias, float eps, bool silu, Tensor? shift) -> Tensor"),
)
def _group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None
) -> Tensor:
    channels_last = _is_channels_last(x)
    x = x if channels_last else x.contiguous()
    out = torch.empty_like(x)
    batch, channels = x.shape[:2]
    positions = x.numel() // (batch * channels)
    weight, bias = _values(weight), _values(bias)
    shift = None if shift is None else _values(shift)
    rows = batch * -(-positions // _BLOCK)
    moments = torch.empty(rows, groups, 2, dtype=torch.float64) if channels_last else None
    arguments = GroupNormArguments(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        shift=None if shift is None else shift.data_ptr(),
        moments=None if moments is None else moments.data_ptr(),
        out=out.data_ptr(),
        channels=channels,
        positions=positions,
        groups=groups,
        dtype=NATIVE_DTYPES[x.dtype],
        silu=silu,
        block=_BLOCK,
        eps=eps,
    )
    native = native_library()
    assert native is not None
    if channels_last:
        native.group_moments(rows, _BLOCK * channels, arguments)
        native.group_norm_channels_last(rows, _BLOCK * channels, arguments)
    else:
        native.group_norm(batch * groups, channels // groups * positions, arguments)
    return out


@_group_norm.register_fake
def _(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None) -> Tensor:
    return torch.empty_like(x if _is_channels_last(x) else x.contiguous())


def _is_channels_last(x: Tensor) -> bool:
    """Whether an image's channels lie side by side; images of one position or channel count as planes."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _values(parameter: Tensor) -> Tensor:
    """As the loops take them: fp32, contiguous."""
    return parameter.to(torch.float32).contiguous()
