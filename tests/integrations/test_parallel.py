"""Packed models in the wrappers by which torch trains on several processes or devices."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import smooth_unet
from peft import LoraConfig
from torch.nn.parallel import DistributedDataParallel

from diffusers_bitsfusion import quantize_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["keep", "table", "cache"])
def test_an_adapter_trains_under_distributed_data_parallel(process_group, make_config, kind):
    unet = quantize_model(smooth_unet(), make_config(time_embedding=kind), progress=False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad and parameter.dim() == 2]
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    gradients = []
    for model in (unet, DistributedDataParallel(unet)):  # It passes every parameter on, codes too.
        unet.zero_grad()
        model(sample, 501, states).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in trained])
    assert trained and all(gradient.any() for gradient in gradients[0])
    for alone, wrapped in zip(*gradients, strict=True):
        torch.testing.assert_close(wrapped, alone)
