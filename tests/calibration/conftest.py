"""A pipeline small enough to be calibrated many times."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import tiny_pipeline
from torch import nn

from diffusers_bitsfusion import BitsFusionConfig, Calibration

# Of the UNet's blocks one is quantized: rounding takes most of the time.
QUANTIZED = "down_blocks.0"
LEFT = ["down_blocks.1", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding"]
PROMPTS = ["a cat", "a red car", "two dogs"]


@pytest.fixture
def make_pipeline(tmp_path) -> Callable[[], StableDiffusionPipeline]:
    """The same pipeline each time."""
    return lambda: tiny_pipeline(tmp_path, layers_per_block=1)


@pytest.fixture
def config() -> BitsFusionConfig:
    return BitsFusionConfig(recipe=2, modules_to_not_convert=LEFT)


@pytest.fixture
def make_calibration() -> Callable[..., Calibration]:
    """Three prompts in three batches, two steps each."""

    def make(**changes) -> Calibration:
        settings = {"prompts": PROMPTS, "num_samples": 3, "num_inference_steps": 2, "batch_size": 1}
        return Calibration(**(settings | changes))

    return make


@pytest.fixture
def equal_models() -> Callable[[nn.Module, nn.Module], bool]:
    """Whether two models have the same parameters, to the bit."""

    def compare(one: nn.Module, other: nn.Module) -> bool:
        first, second = one.state_dict(), other.state_dict()
        return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    return compare


@pytest.fixture(autouse=True)
def _one_thread(one_thread) -> None:
    pass
