"""Extremely low-bit diffusion models for diffusers: BitsFusion (arXiv 2406.04333) as a quantization method.

Importing this package registers the method with diffusers.
"""

from .accounting import size_report
from .calibration import Calibration
from .compute import set_compute
from .config import BitsFusionConfig
from .nn import BitsFusionConv2d, BitsFusionLinear
from .quantize import quantize_model
from .quantizer import BitsFusionQuantizer
from .recipe import Recipe
from .registration import register
from .requantize import requantize_branches
from .training.qat import convert, prepare_qat

__version__ = "0.1.0"

__all__ = [
    "BitsFusionConfig",
    "BitsFusionConv2d",
    "BitsFusionLinear",
    "BitsFusionQuantizer",
    "Calibration",
    "Recipe",
    "convert",
    "prepare_qat",
    "quantize_model",
    "requantize_branches",
    "set_compute",
    "size_report",
]

register()
