"""Integer products of activations and codes on a CPU: a plain reference and the fast kernels.

Without VNNI they are compiled loops, for tokens and for convolutions: codes of few bits leave room in 16 bits for many
products before they are widened, which oneDNN, whose weights may be any bytes, does after every second one. Which
layers take them, `dispatch.multiplies_blocks` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..native.arguments import ProductArguments
from ..native.library import native_library
from ..utils.private_names import TORCH_INT_MM
from .decode import decode_into_blocks, scratch

# Number of int32 sums that are rescaled before the next are made: they stay in a processor's cache, and their memory
# is used again.
MAX_SUMS = 1 << 20

# Outputs of a block of codes, which `products.c` reads.
_BLOCK = 16

# Products that are worth another thread; a thread computes some 100 a nanosecond.
_PRODUCTS_PER_THREAD = 1 << 23


@dataclass(frozen=True)
class Windows:
    """What a convolution without groups sees, in pairs of height and width: that of a token is the token.

    Attributes:
        image: of the input.
        out: of the output.
        kernel, stride, padding, dilation: as in `torch.nn.functional.conv2d`.
    """

    image: Sequence[int]
    out: Sequence[int]
    kernel: Sequence[int] = (1, 1)
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)


def int_mm_reference(tokens: Tensor, weight: Tensor, sums: Tensor) -> Tensor:
    """Multiply tokens by weightᵀ.

    Args:
        tokens: int8 [tokens, in], contiguous.
        weight: int8 [out, in], contiguous.
        sums: int32 [at least tokens, out]; its first rows are written and returned.
    """
    sums = sums[: len(tokens)]
    # For single columns, whose strides are ambiguous, `_int_mm` leaves its output unset (pytorch/pytorch#195066).
    if weight.shape[1] == 1:
        return torch.mul(tokens.to(torch.int32), weight.T, out=sums)
    product: Tensor = TORCH_INT_MM.require(torch)(tokens, weight.T, out=sums)
    return product


def block_codes(codes: Tensor, scale: Tensor, bits: int, shape: Sequence[int], kept: bool) -> Tensor:
    """Decode codes into blocks of 16 outputs; unless `kept`, the next call on this thread may write them over.

    Args:
        codes: uint8 [out, dense_width(columns, bits)], the dense form of `codec.radix`.
        scale: fp32 [out].
        bits: 1 to 7.
        shape: (out, in) or (out, in, kernel height, kernel width).
        kept: whether the blocks are the caller's own.

    Returns:
        int8, one-dimensional: [ceil(out / 16), kernel height * kernel width, ceil(in / 4), 16, 4], then minus the sum
        of each output's codes, four bytes each. Outputs and inputs beyond those that there are have any values.

    Raises:
        MemoryError: there is none for the loop to work in.
    """
    outputs, inputs, *kernel = shape
    size = -(-outputs // _BLOCK) * _BLOCK * (torch.Size(kernel).numel() * -(-inputs // 4) * 4 + 4)
    blocked = torch.empty(size, dtype=torch.int8, device="cpu") if kept else scratch(size).view(torch.int8)
    decode_into_blocks(codes.contiguous(), scale.contiguous(), bits, shape, torch.int8, _BLOCK, blocked.data_ptr())
    return blocked


def multiply_blocks(
    image: Tensor, zero_point: int, weight: Tensor, bits: int, windows: Windows, first: int, sums: Tensor
) -> Tensor:
    """Convolve positions of an image, less what stands for zero, with codes.

    Args:
        image: uint8, or int8 whose zero is 0, [batch, height, width, in], contiguous.
        zero_point: what stands for zero in an image of uint8, and in its padding.
        weight: `block_codes` of the convolution.
        bits: of the codes.
        windows: of the convolution.
        first: position, of all [batch, out height, out width] in their order, from which on are computed as many as
            `sums` has rows.
        sums: int32 [positions, out], contiguous; written and returned.

    Raises:
        MemoryError: there is none for the loop to work in.
    """
    native, signed = native_library(), image.dtype == torch.int8
    assert native is not None  # `dispatch.multiplies_blocks` has looked.
    assert native.multiply is not None
    count, outputs = sums.shape
    arguments = ProductArguments(
        image=image.data_ptr(),
        weight=weight.data_ptr(),
        sums=sums.data_ptr(),
        first=first,
        count=count,
        flip=128 if signed else 0,
        zero_point=128 if signed else zero_point,
        inputs=image.shape[3],
        outputs=outputs,
        bits=bits,
    )
    arguments.height, arguments.width = windows.image
    arguments.out_height, arguments.out_width = windows.out
    arguments.kernel_height, arguments.kernel_width = windows.kernel
    arguments.stride_y, arguments.stride_x = windows.stride
    arguments.pad_y, arguments.pad_x = windows.padding
    arguments.dilation_y, arguments.dilation_x = windows.dilation
    arguments.panels, arguments.groups = _shares(count, native.panel_positions, -(-outputs // _BLOCK))
    products = count * image.shape[3] * torch.Size(windows.kernel).numel() * outputs
    parts = arguments.panels * arguments.groups
    native.multiply(parts, products // parts, arguments, per_thread=_PRODUCTS_PER_THREAD)
    return sums


def int_mm(tokens: Tensor, weight: Tensor, bits: int, sums: Tensor) -> Tensor:
    """Multiply as `int_mm_reference` by the fastest kernel; `weight` is a plain one, or `block_codes` of it."""
    if weight.dim() == 2:
        return int_mm_reference(tokens, weight, sums)
    windows = Windows((1, len(tokens)), (1, len(tokens)))
    return multiply_blocks(tokens[None, None], 0, weight, bits, windows, 0, sums[: len(tokens)])


def _shares(positions: int, largest: int, blocks: int) -> tuple[int, int]:
    """Return in how many parts positions and blocks of outputs are shared out, so that threads have as much to do."""
    threads, panels = torch.get_num_threads(), max(1, -(-positions // largest))
    if panels >= threads:
        return -(-panels // threads) * threads, 1
    return panels, min(blocks, -(-4 * threads // panels))
