"""Mean and second moment of what a layer multiplies its weight with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn

# Rows of a strip of `Gram`: above half of the matrix by little, and products that a GEMM is still fast at.
_STRIP = 256


def sample_inputs(layer: nn.Linear | nn.Conv2d, x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Inputs of a layer as rows: its weight, flattened to [out, columns], times a row is an output at one position.

    Args:
        layer: a linear layer, or a convolution of any stride, padding, dilation and number of groups.
        x: its input, [..., in] or [batch, in, height, width].
        most: positions to take of each sample of the batch on average, at random; all where there are no more.
        generator: on the CPU.

    Returns:
        fp32 [positions, in * kernel height * kernel width]. With groups, columns of one group follow those of another.
    """
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows[_choose(len(rows), most * len(x), generator).to(x.device)].float()
    windows = _windows(layer, x)
    batch, _, height, width = windows.shape[:4]
    chosen = _choose(batch * height * width, most * batch, generator).to(x.device)
    sample, position = chosen // (height * width), chosen % (height * width)
    return windows[sample, :, position // width, position % width].flatten(1).float()


def _choose(count: int, most: int, generator: torch.Generator) -> Tensor:
    return torch.arange(count) if count <= most else torch.randperm(count, generator=generator)[:most]


def _windows(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What the kernel sees at each output position, a view [batch, in, height, width, kernel height, kernel width]."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)
    return x[..., :: layer.dilation[0], :: layer.dilation[1]]


def channel_blocks(layer: nn.Linear | nn.Conv2d, most_columns: int) -> list[tuple[int, int]]:
    """(first, last + 1) input channel of each block: equal parts of each group, of at most `most_columns` columns.

    A block has one channel at least.
    """
    channels, groups = layer.weight.shape[1], getattr(layer, "groups", 1)
    taps = layer.weight[0, 0].numel()
    count = -(-channels // max(1, most_columns // taps))
    bounds = [channels * i // count for i in range(count + 1)]
    return [
        (group * channels + start, group * channels + stop)
        for group in range(groups)
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]


def moment_bytes(layer: nn.Linear | nn.Conv2d, most_columns: int) -> int:
    """Bytes that `InputMoments` of the layer takes."""
    total = 0
    for size in block_sizes(layer, most_columns):
        total += size + sum(min(_STRIP, left) * left for left in range(size, 0, -_STRIP))
    return 4 * total


def block_sizes(layer: nn.Linear | nn.Conv2d, most_columns: int) -> list[int]:
    """Columns of each block."""
    taps = layer.weight[0, 0].numel()
    return [taps * (stop - start) for start, stop in channel_blocks(layer, most_columns)]


class Gram:
    """Sum of rowᵀ row, a symmetric matrix, of which one triangle is kept: half the memory and half the arithmetic.

    Args:
        size: columns of the rows.
        device: to sum on.

    Attributes:
        strips: fp32 [256, size - 256 * i] each, from the diagonal to the right; the last is lower.
    """

    def __init__(self, size: int, device: torch.device):
        self.strips = [
            torch.zeros(min(_STRIP, size - first), size - first, device=device) for first in range(0, size, _STRIP)
        ]

    def add(self, rows: Tensor) -> None:
        """Count in rows fp32 [positions, size]."""
        for first, strip in zip(range(0, rows.shape[1], _STRIP), self.strips, strict=True):
            strip.addmm_(rows[:, first : first + _STRIP].T, rows[:, first:])

    def diagonal(self) -> Tensor:
        """fp32 [size]."""
        return torch.cat([strip.diagonal() for strip in self.strips])

    def full(self) -> Tensor:
        """Both triangles, fp32 [size, size]."""
        size = self.strips[0].shape[1]
        full = torch.empty(size, size, device=self.strips[0].device)
        for first, strip in zip(range(0, size, _STRIP), self.strips, strict=True):
            full[first : first + _STRIP, first:] = strip
            full[first:, first : first + _STRIP] = strip.T
        return full


class InputMoments:
    """Sums over a layer's inputs; products of two columns of different blocks are left out.

    Attributes:
        blocks: (first, last + 1) column of each block.
        count: rows seen.
        total: fp32 [columns], sum of the rows.
        products: of each block, the sum of rowᵀ row.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, most_columns: int):
        taps, device = layer.weight[0, 0].numel(), layer.weight.device
        self.blocks = [(taps * start, taps * stop) for start, stop in channel_blocks(layer, most_columns)]
        self.count = 0
        self.total = torch.zeros(self.blocks[-1][1], device=device)
        self.products = [Gram(stop - start, device) for start, stop in self.blocks]

    def add(self, rows: Tensor) -> None:
        """Count in rows fp32 [positions, columns]."""
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        for (start, stop), product in zip(self.blocks, self.products, strict=True):
            product.add(rows[:, start:stop])

    def sum_over_processes(self) -> None:
        """Add up what all processes have seen."""
        count = torch.tensor(self.count, device=self.total.device)
        self.count = int(reduce(count, "sum"))
        self.total = reduce(self.total, "sum")
        for product in self.products:
            product.strips = [reduce(strip, "sum") for strip in product.strips]

    @property
    def is_finite(self) -> bool:
        """Whether no NaN or infinite input has been counted in; the diagonal holds a square of every one."""
        return all(bool(torch.isfinite(product.diagonal()).all()) for product in self.products)

    def mean(self) -> Tensor:
        """fp32 [columns]; zeros where nothing was seen."""
        return self.total / max(1, self.count)

    def second_moment(self, block: int, centred: bool) -> Tensor:
        """E[x xᵀ] of a block, fp32 [size, size]; `centred`: the covariance."""
        moment = self.products[block].full().div_(max(1, self.count))
        if centred:
            start, stop = self.blocks[block]
            mean = self.mean()[start:stop]
            moment.addr_(mean, mean, alpha=-1)
        return moment

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "total": self.total, "products": [product.strips for product in self.products]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]
        self.total.copy_(state["total"])
        for product, strips in zip(self.products, state["products"], strict=True):
            for strip, saved in zip(product.strips, strips, strict=True):
                strip.copy_(saved)
