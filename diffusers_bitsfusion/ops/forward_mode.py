"""What stands in for the layers' operators, which carry no tangents, in forward-mode differentiation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..utils.private_names import TORCH_FORWARD_LEVEL
from .decode import decode_weight


def in_forward_mode() -> bool:
    """Return whether tangents may pass through the current call (`torch.func.jvp`, `autograd.forward_ad`).

    Torch has one level for the process, so that other threads compute exactly meanwhile, too.
    """
    level: int = TORCH_FORWARD_LEVEL.read(forward_ad, -1)
    return level >= 0


@torch.library.custom_op(
    "bitsfusion::weight",
    mutates_args=(),
    schema="(Tensor codes, Tensor scale, int bits, SymInt[] shape, ScalarType dtype) -> Tensor",
)
def weight(codes: Tensor, scale: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the decoded weight for torch's own linear layer or convolution, by an operator that transforms accept.

    Args:
        codes: uint8 [out, dense_width(columns, bits)], the dense form of `codec.radix`.
        scale: int32 [out], the bits of the fp32 scales.
        bits: 1 to 8.
        shape: of the weight.
        dtype: of the weight, floating.
    """
    return decode_weight(codes, scale.view(torch.float32), bits, tuple(shape), dtype)


@weight.register_fake
def _(codes: Tensor, scale: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)
