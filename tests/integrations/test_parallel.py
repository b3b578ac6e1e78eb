"""Packed models in the wrappers by which torch trains on several processes or devices."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from helpers import all_packed_layers, smooth_unet
from peft import LoraConfig
from torch.nn.parallel import DistributedDataParallel, replicate

from diffusers_bitsfusion import quantize_model, set_compute

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


def test_replicas_of_data_parallel_compute_with_parameters_of_their_own(monkeypatch, make_config):
    def copies(tensors, devices, detach=False):
        return [[tensor.detach().clone() for tensor in tensors] for _ in devices]

    module = sys.modules[replicate.__module__]
    monkeypatch.setattr(module, "_get_device_index", lambda device, _: device)
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    unet = quantize_model(smooth_unet(), make_config(), progress=False)
    call = torch.randn(2, 4, 8, 8), 501, torch.randn(2, 5, 32)
    for settings in (("auto", "packed"), ("int8", "int8")):
        set_compute(unet, *settings)
        with torch.no_grad():
            replicas = replicate(unet, [0, 1])
            kept = [layer.int8_weight is not None for layer in all_packed_layers(unet).values()]
            assert any(kept) == (settings[1] == "int8")
            for replica in replicas:
                assert all(layer.int8_weight is None for layer in all_packed_layers(replica).values())
                assert torch.equal(replica(*call).sample, unet(*call).sample)
