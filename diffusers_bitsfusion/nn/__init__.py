"""Layers on packed weights."""

from .conv import BitsFusionConv2d
from .linear import BitsFusionLinear
from .packed import PackedWeight
from .time_features import TimeFeatures
from .trainable import QATConv2d, QATLinear

__all__ = ["BitsFusionConv2d", "BitsFusionLinear", "PackedWeight", "QATConv2d", "QATLinear", "TimeFeatures"]
