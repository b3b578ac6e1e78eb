"""Extremely low-bit diffusion models for diffusers: BitsFusion (arXiv 2406.04333) as a quantization method.

Importing this package registers the method with diffusers.
"""

from .accounting import size_report
from .config import BitsFusionConfig
from .nn import BitsFusionConv2d, BitsFusionLinear
from .quantize import quantize_model
from .quantizer import BitsFusionQuantizer
from .recipe import Recipe
from .registration import register

__version__ = "0.1.0"

__all__ = [
    "BitsFusionConfig",
    "BitsFusionConv2d",
    "BitsFusionLinear",
    "BitsFusionQuantizer",
    "Recipe",
    "quantize_model",
    "size_report",
]

register()
