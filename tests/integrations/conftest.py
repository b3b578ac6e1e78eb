"""Packed UNets and their dequantized copies, quantized once a file."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from lora_cases import DTYPES
from tiny import tiny_unet

from diffusers_bitsfusion import quantize_model


@pytest.fixture(scope="module")
def originals(make_config):
    """Quantized UNets and their dequantized copies by dtype, to copy from."""
    packed = {d: quantize_model(tiny_unet().to(d), make_config(), progress=False) for d in DTYPES}
    return {d: (unet, copy.deepcopy(unet).dequantize()) for d, unet in packed.items()}


@pytest.fixture
def unets(originals) -> Callable[..., tuple[UNet2DConditionModel, UNet2DConditionModel]]:
    """Make a packed UNet and its dequantized copy."""

    def make(dtype=torch.float32) -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
        return copy.deepcopy(originals[dtype])

    return make


@pytest.fixture
def unet(unets) -> UNet2DConditionModel:
    """A packed UNet in fp32."""
    return unets()[0]
