"""Layers on packed weights."""

from .conv import BitsFusionConv2d
from .linear import BitsFusionLinear
from .packed import PackedWeight
from .time_features import TimeFeatures

__all__ = ["BitsFusionConv2d", "BitsFusionLinear", "PackedWeight", "TimeFeatures"]
