"""Packed pipelines in the formats of other engines."""

from .openvino import export_openvino

__all__ = ["export_openvino"]
