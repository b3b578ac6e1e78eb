"""Layers on packed weights."""

from .conv import BitsFusionConv2d
from .fake_quantized import QATConv2d, QATLinear
from .linear import BitsFusionLinear
from .packed import PackedWeight
from .time_features import TimeFeatures

__all__ = ["BitsFusionConv2d", "BitsFusionLinear", "PackedWeight", "QATConv2d", "QATLinear", "TimeFeatures"]
