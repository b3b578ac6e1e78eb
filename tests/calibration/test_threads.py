"""Calibration and tuning with other numbers of threads: torch adds in another order, and little may come of it."""

from __future__ import annotations

from typing import Any

import torch
from helpers import all_packed_layers, relative_error
from torch import Tensor

from diffusers_bitsfusion import quantize_model
from diffusers_bitsfusion.nn.packed import from_float_bits

# Largest differences that docs/RELIABILITY.md allows: the share of codes; relative, of scales and of predicted noise.
CODES, SCALES, NOISE = 0.001, 1e-4, 1e-4


@torch.no_grad()
def test_a_second_thread_changes_few_codes_and_last_digits(make_pipeline, config, make_calibration):
    torch.manual_seed(0)
    inputs: tuple[Any, ...] = torch.randn(2, 4, 8, 8), 500, torch.randn(2, 5, 32)

    def calibrated(threads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return steps of half a level [weights], scales [rows], and the noise that the model predicts."""
        torch.set_num_threads(threads)
        calibration = make_calibration(tuning_steps=10)
        unet = quantize_model(make_pipeline(), config, progress=False, calibration=calibration).unet
        torch.set_num_threads(1)
        steps, scales = [], []
        for layer in all_packed_layers(unet).values():
            scale = from_float_bits(layer.scale)
            steps.append((2 * layer.weight.dequantize().flatten(1) / scale[:, None]).round().flatten())
            scales.append(scale)
        return torch.cat(steps), torch.cat(scales), unet(*inputs).sample

    steps, scales, noise = calibrated(1)
    other_steps, other_scales, other_noise = calibrated(2)
    assert (steps != other_steps).float().mean() <= CODES
    assert relative_error(other_scales, scales) <= SCALES
    assert relative_error(other_noise, noise) <= NOISE
