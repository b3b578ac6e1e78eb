"""Rounding for a model's own inputs, measured along the denoising (not from the BitsFusion paper)."""
