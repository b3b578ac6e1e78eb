"""Bytes of the file and of memory that are asked for, against what is saved and held."""

from __future__ import annotations

import pytest
import torch
from helpers import packed_layers
from tiny import tiny_unet

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.allocation.file_bytes import GAUSSIAN_ENTROPY, allocate_rates
from diffusers_bitsfusion.codec.scales import GAUSSIAN_STEP
from diffusers_bitsfusion.reporting.size_prediction import predict_size


def test_entropies_are_those_of_a_gaussian():
    sample = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for bits, (entropy, step) in enumerate(zip(GAUSSIAN_ENTROPY, GAUSSIAN_STEP[True], strict=True), start=1):
        half = 127 if bits == 8 else 2 ** (bits - 1)
        _, counts = (sample / step).round().clamp(-half, half).unique(return_counts=True)
        shares = counts / counts.sum()
        assert float(-(shares * shares.log2()).sum()) == pytest.approx(entropy, abs=0.01)


def test_rates_use_the_budget_and_differ_from_the_recipe_by_a_constant():
    bits, sizes = {"a": 1, "b": 3, "c": 2}, {"a": 5000, "b": 100, "c": 700}
    rates = allocate_rates(bits, sizes, 9000.0)
    assert sum(rates[name] * sizes[name] for name in bits) == pytest.approx(9000)
    shifts = [rates[name] - GAUSSIAN_ENTROPY[bits[name] - 1] for name in bits]
    assert max(shifts) - min(shifts) < 1e-9
    with pytest.raises(ValueError, match="are outside"):
        allocate_rates(bits, sizes, 1000.0)


@pytest.mark.parametrize("scale_dtype", [None, "float32"])
@pytest.mark.parametrize("time_embedding", ["cache", "keep"])
def test_the_file_has_the_bytes_that_were_asked_for(time_embedding, scale_dtype, tmp_path):
    base = BitsFusionConfig(recipe=3, time_embedding=time_embedding)
    target = int(0.9 * predict_size(tiny_unet(), base, torch.float32).total_bytes)
    config = BitsFusionConfig(target_bytes=target, time_embedding=time_embedding, scale_dtype=scale_dtype)
    unet = quantize_model(tiny_unet(), config, progress=False)
    unet.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert 0.95 * target < file.stat().st_size <= 1.01 * target
    again = type(unet).from_pretrained(tmp_path)
    for name, layer in packed_layers(unet).items():
        assert torch.equal(layer.weight, packed_layers(again)[name].weight)
    assert again.config.quantization_config.target_bytes == target


def test_memory_has_at_most_the_bytes_that_were_asked_for():
    unet = quantize_model(tiny_unet(), BitsFusionConfig(recipe=3, time_embedding="table"), progress=False)
    target = int(0.97 * sum(tensor.nbytes for tensor in unet.state_dict().values()))
    config = BitsFusionConfig(target_bytes=target, budget="memory", time_embedding="table")
    smaller = quantize_model(tiny_unet(), config, progress=False)
    assert 0.9 * target < sum(tensor.nbytes for tensor in smaller.state_dict().values()) <= target


def test_a_target_out_of_reach_is_refused_before_anything_changes():
    unet = tiny_unet()
    with pytest.raises(ValueError, match="target_bytes=1000 cannot be reached"):
        quantize_model(unet, BitsFusionConfig(target_bytes=1000), progress=False)
    assert not packed_layers(unet)
    for wrong in ({"target_bytes": 0}, {"target_bytes": 5.5}, {"budget": "disk"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BitsFusionConfig(**wrong)
