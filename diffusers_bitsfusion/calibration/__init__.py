"""Rounding for a model's own inputs, measured while denoising (not from the BitsFusion paper)."""
