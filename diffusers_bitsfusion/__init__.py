"""Extremely low-bit diffusion models for diffusers: BitsFusion (arXiv 2406.04333) as a quantization method.

Importing this package registers the method with diffusers.
"""

from .config.bitsfusion import BitsFusionConfig
from .config.calibration import Calibration
from .config.recipe import Recipe
from .integrations.diffusers_quantizer import BitsFusionQuantizer
from .integrations.registration import register
from .nn import BitsFusionConv2d, BitsFusionLinear
from .nn.compute import set_compute
from .packing.requantize import requantize_branches
from .qat import convert, prepare_qat
from .quantize import quantize_model
from .reporting.size_report import size_report

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
