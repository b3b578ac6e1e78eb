"""Mean and second moment of the inputs that a layer multiplies with its weight."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn

from ..utils.json_files import is_count
from ..utils.private_names import TORCH_PADDING
from ..utils.torch_files import is_finite_tensor
from .gram import Gram, gram_numel


def sample_inputs(layer: nn.Linear | nn.Conv2d, x: Tensor, max_positions: int, generator: torch.Generator) -> Tensor:
    """Return inputs of a layer as rows.

    The layer's weight, flattened to [out, columns], times a row is its output at one position.

    Args:
        layer: linear layer, or convolution of any stride, padding, dilation and number of groups.
        x: input of the layer, floating [..., in] or [batch, in, height, width].
        max_positions: number of random positions of each sample of the batch, on average; all where there are fewer.
        generator: generator on the CPU that chooses the positions.

    Returns:
        fp32 [positions, in * kernel height * kernel width]. With groups, columns of one group follow those of another.
    """
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows[_choose(len(rows), max_positions * len(x), generator).to(x.device)].float()
    windows = _windows(layer, x)
    batch, _, height, width = windows.shape[:4]
    chosen = _choose(batch * height * width, max_positions * batch, generator).to(x.device)
    sample, position = chosen // (height * width), chosen % (height * width)
    return windows[sample, :, position // width, position % width].flatten(1).float()


def _choose(count: int, max_count: int, generator: torch.Generator) -> Tensor:
    return torch.arange(count) if count <= max_count else torch.randperm(count, generator=generator)[:max_count]


def _windows(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the window of each output position, a view [batch, in, height, width, kernel height, kernel width]."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, TORCH_PADDING.require(layer), mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)
    return x[..., :: layer.dilation[0], :: layer.dilation[1]]


def channel_blocks(layer: nn.Linear | nn.Conv2d, max_columns: int) -> list[tuple[int, int]]:
    """Return (first, last + 1) input channel of each block.

    Blocks are equal parts of each group, of at most `max_columns` columns, but of one channel at least.
    """
    channels, groups = layer.weight.shape[1], getattr(layer, "groups", 1)
    taps = layer.weight[0, 0].numel()
    count = -(-channels // max(1, max_columns // taps))
    bounds = [channels * i // count for i in range(count + 1)]
    return [
        (group * channels + start, group * channels + stop)
        for group in range(groups)
        for start, stop in pairwise(bounds)
    ]


def column_blocks(layer: nn.Linear | nn.Conv2d, max_columns: int) -> list[tuple[int, int]]:
    """Return (first, last + 1) column of each of `channel_blocks`."""
    taps = layer.weight[0, 0].numel()
    return [(taps * start, taps * stop) for start, stop in channel_blocks(layer, max_columns)]


def moment_bytes(layer: nn.Linear | nn.Conv2d, max_columns: int) -> int:
    """Return the bytes of `InputMoments` of the layer."""
    sizes = [stop - start for start, stop in column_blocks(layer, max_columns)]
    return 4 * sum(gram_numel(size) + size for size in sizes)


class InputMoments:
    """Sums over a layer's inputs, without the products of columns of different blocks.

    Args:
        layer: layer whose inputs are summed, on whose device the sums are.
        max_columns: upper bound of the columns of a block.

    Attributes:
        blocks: (first, last + 1) column of each block.
        count: number of rows added.
        total: fp32 [columns], sum of the rows.
        products: sum of rowᵀ row for each block.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, max_columns: int) -> None:
        device = layer.weight.device
        self.blocks = column_blocks(layer, max_columns)
        self.count = 0
        self.total = torch.zeros(self.blocks[-1][1], dtype=torch.float32, device=device)
        self.products = [Gram(stop - start, device) for start, stop in self.blocks]

    def add(self, rows: Tensor) -> None:
        """Add rows, fp32 [positions, columns]."""
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        for (start, stop), product in zip(self.blocks, self.products, strict=True):
            product.add(rows[:, start:stop])

    def sum_over_processes(self) -> None:
        """Replace the sums of this process by those over all processes."""
        count = torch.tensor(self.count, device=self.total.device)
        self.count = int(reduce(count, "sum"))
        self.total = reduce(self.total, "sum")
        for product in self.products:
            product.values.copy_(reduce(product.values, "sum"))

    @property
    def is_finite(self) -> bool:
        """True while no NaN or infinite input has been added: the diagonal sums the square of every input."""
        return all(bool(torch.isfinite(product.diagonal()).all()) for product in self.products)

    def mean(self) -> Tensor:
        """Return the mean of the rows, fp32 [columns]; zeros where no row was added."""
        return self.total / max(1, self.count)

    def second_moment(self, block: int, centred: bool) -> Tensor:
        """Return E[x xᵀ] of a block, fp32 [size, size], or where `centred` the covariance."""
        moment = self.products[block].full().div_(max(1, self.count))
        if centred:
            start, stop = self.blocks[block]
            mean = self.mean()[start:stop]
            moment.addr_(mean, mean, alpha=-1)
        return moment

    def state_dict(self) -> dict[str, Any]:
        """Return the sums by name, which `load_state_dict` accepts."""
        return {"count": self.count, "total": self.total, "products": [product.values for product in self.products]}

    def is_state(self, state: Any) -> bool:
        """Whether `load_state_dict` can take it: of the same layer, and finite."""
        return (
            isinstance(state, dict)
            and state.keys() == {"count", "total", "products"}
            and is_count(state["count"])
            and is_finite_tensor(state["total"], torch.float32, self.total.shape)
            and isinstance(state["products"], list)
            and len(state["products"]) == len(self.products)
            and all(
                is_finite_tensor(saved, product.values.dtype, product.values.shape)
                for saved, product in zip(state["products"], self.products, strict=True)
            )
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the sums by those of `state_dict`."""
        self.count = state["count"]
        self.total.copy_(state["total"])
        for product, saved in zip(self.products, state["products"], strict=True):
            product.values.copy_(saved)
