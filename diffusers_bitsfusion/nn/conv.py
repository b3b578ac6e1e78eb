"""2-D convolution on packed weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.conv import conv2d, int8_conv_weight
from ..ops.dispatch import wants_channels_last
from ..ops.transforms import in_transform, weight
from .packed import PackedWeight, autocast


class BitsFusionConv2d(PackedWeight, nn.Conv2d):
    """`torch.nn.Conv2d` whose weight is kept as packed codes and per-output-channel scales.

    Built by `quantize_model`, `from_pretrained` or `from_float`. Attributes:
    see `PackedWeight`, and `bias` as in `nn.Conv2d`. Every stride, dilation, group count and padding mode works.
    Differentiable in its input and bias, not in codes or scales.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of `x`, floating [batch, in, height, width] or without the batch."""
        if input.dim() == 3:  # nn.Conv2d takes an image without a batch, too.
            return self.forward(input.unsqueeze(0)).squeeze(0)
        x = autocast(input)
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        x, padding = self._pad(x)
        packed, geometry = (self.codes, self.scale_bits), (self.stride, padding, self.dilation, self.groups)
        if in_transform():
            y = F.conv2d(x, weight(*packed, self.bits, self.weight_shape, x.dtype), bias, *geometry)
        else:
            # The layout changes here, where a compiler fuses the change with what made x.
            if wants_channels_last(x, self.computes_int8, self.out_channels):
                x = x.contiguous(memory_format=torch.channels_last)
            y = conv2d(x, *packed, bias, self.bits, self.weight_shape, *geometry, self.computes_int8, self.int8_weight)
        return y + self._branch(x, padding) if self.branch_rank else y

    def _make_int8_weight(self) -> Tensor:
        padding = self._zero_padding or (0, 0)
        geometry = self.stride, padding, self.dilation, self.groups
        return int8_conv_weight(self.codes, self.scale_bits, self.bits, self.weight_shape, geometry)

    def _branch(self, x: Tensor, padding: tuple[int, ...]) -> Tensor:
        hidden = F.conv2d(x, self.branch_down.to(x.dtype), None, self.stride, padding, self.dilation)
        return F.conv2d(hidden, self.branch_up.to(x.dtype))

    @property
    def _zero_padding(self) -> tuple[int, ...] | None:
        """What the convolution pads by itself, zeros of a given width on both sides; None where it cannot."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return None
        # oneDNN's integer convolution (torch 2.13) does not write rows whose windows see nothing but padding, where a
        # group has one input channel.
        sees_padding_alone = self.padding[0] > self.dilation[0] * (self.kernel_size[0] - 1)
        return None if self.computes_int8 and sees_padding_alone else self.padding

    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Other padding, done ahead: (padded input, padding left to do)."""
        if self._zero_padding is not None:
            return x, self._zero_padding
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
