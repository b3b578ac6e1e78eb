"""A model in a few words, for the labels of pictures and pages."""

from __future__ import annotations

from diffusers import DiffusionPipeline, ModelMixin

from .size_report import MB, SizeReport, size_report


def describe_denoiser(pipeline: DiffusionPipeline) -> str:
    """Return what `describe` says of a pipeline's UNet or transformer."""
    parts = (getattr(pipeline, name, None) for name in ("unet", "transformer"))
    return describe(next(part for part in parts if part is not None))


def describe(model: ModelMixin) -> str:
    """Return bits a weight and MB of a model: "2.03 bits, 1.3 MB", of one in full precision as fp16 takes them."""
    if getattr(model, "is_quantized", False):
        report = size_report(model)
        assert isinstance(report, SizeReport)
        return f"{report.average_bits.layers:.2f} bits, {report.total_bytes / MB:.3g} MB"
    return f"16 bits, {2 * model.num_parameters() / MB:.3g} MB"
