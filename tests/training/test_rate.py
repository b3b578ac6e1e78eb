"""The price of bits in training: its value and gradient against plain statements, and what a run does with it."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from tiny import tiny_unet
from torch import nn

from diffusers_bitsfusion import convert, prepare_qat
from diffusers_bitsfusion.nn.fake_quantized import fake_quantized_from_float
from diffusers_bitsfusion.packing.file_budget import codes_rate
from diffusers_bitsfusion.packing.planning import make_plan
from diffusers_bitsfusion.qat import qat_layers
from diffusers_bitsfusion.training.batches import Batch
from diffusers_bitsfusion.training.losses import Distillation, NoisePrediction
from diffusers_bitsfusion.training.rate import PricedCodes, codes_entropy, rounded_entropy

pytestmark = pytest.mark.usefixtures("one_thread")


def layer_of(bits, rows=12, columns=40):
    torch.manual_seed(bits)
    return fake_quantized_from_float(nn.Linear(columns, rows), bits)


def soft_entropy(weight, scale, half):
    """Bits of all weights in numpy: every weight is shared by the two levels around it."""
    values = np.clip(weight / scale[:, None], -half, half).ravel()
    levels = np.arange(-half, half + 1)
    counts = np.maximum(1 - np.abs(values[:, None] - levels), 0).sum(axis=0)
    counts = counts[counts > 0]
    return -(counts * np.log2(counts / counts.sum())).sum()


def hard_entropy(layer):
    """Bits of all codes, from the shares of each."""
    codes = layer.codes_and_scale()[0].detach().numpy()
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    return -(shares * np.log2(shares)).sum() * codes.size


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_entropy_of_rounded_codes_is_that_of_their_shares(bits):
    layer = layer_of(bits)
    assert rounded_entropy(layer).item() == pytest.approx(hard_entropy(layer), rel=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_entropy_is_that_of_the_soft_histogram(bits):
    layer = layer_of(bits)
    expected = soft_entropy(
        layer.weight.detach().double().numpy(), layer.scale.detach().double().numpy(), 2 ** (bits - 1)
    )
    assert codes_entropy(layer).item() == pytest.approx(expected, rel=1e-5)


def test_codes_on_the_grid_have_their_own_entropy():
    layer = layer_of(2)
    codes, scale = layer.codes_and_scale()
    with torch.no_grad():
        layer.weight.copy_(codes * scale.unsqueeze(1))
    shares = codes.unique(return_counts=True)[1] / codes.numel()
    expected = -float((shares * shares.log2()).sum()) * codes.numel()
    assert codes_entropy(layer).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bits", [1, 3])
def test_gradients_are_those_of_finite_differences(bits):
    layer, half = layer_of(bits), 2 ** (bits - 1)
    codes_entropy(layer).backward()
    weight, scale = layer.weight.detach().double().numpy(), layer.scale.detach().double().numpy()
    for row, column in ((0, 0), (3, 17), (11, 39)):
        moved = 1e-5 * scale[row]
        ends = [weight.copy(), weight.copy()]
        ends[0][row, column] -= moved
        ends[1][row, column] += moved
        slope = (soft_entropy(ends[1], scale, half) - soft_entropy(ends[0], scale, half)) / (2 * moved)
        assert float(layer.weight.grad[row, column]) == pytest.approx(slope, rel=1e-2, abs=1e-2)
    for row in (0, 5):
        moved = 1e-6 * scale[row]
        ends = [scale.copy(), scale.copy()]
        ends[0][row] -= moved
        ends[1][row] += moved
        slope = (soft_entropy(weight, ends[1], half) - soft_entropy(weight, ends[0], half)) / (2 * moved)
        slope /= math.sqrt(weight.shape[1] * half)  # LSQ's factor
        assert float(layer.scale.grad[row]) == pytest.approx(slope, rel=1e-2)


def batch():
    generator = torch.Generator().manual_seed(0)
    noisy, target = torch.randn(2, 2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 5, 32, generator=generator)
    return Batch([0, 1], ["a", "b"], noisy, torch.tensor([3, 700]), states, target)


def test_the_price_is_added_to_the_loss(make_config):
    teacher = tiny_unet().requires_grad_(False)
    student = prepare_qat(copy.deepcopy(teacher).requires_grad_(True), make_config(recipe=2))
    plain = Distillation(student, teacher)
    priced = PricedCodes(plain, student, 0.5)
    with torch.no_grad():
        found, base = priced(student, batch()), plain(student, batch())
    layers = qat_layers(student).values()
    bits = sum(hard_entropy(layer) for layer in layers) / sum(layer.weight.numel() for layer in layers)
    assert found.parts["bits"].item() == pytest.approx(bits, rel=1e-5)
    assert found.total.item() == pytest.approx(base.total.item() + 0.5 * bits, rel=1e-5)


def test_a_price_makes_the_file_smaller(make_config, tmp_path):
    teacher = tiny_unet().requires_grad_(False)
    sizes = []
    for price in (0.0, 1.0):
        student = prepare_qat(copy.deepcopy(teacher).requires_grad_(True), make_config(recipe=2))
        objective = PricedCodes(Distillation(student, teacher), student, price)
        optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
        for _ in range(12):
            objective(student, batch()).total.backward()
            optimizer.step()
            optimizer.zero_grad()
        objective.close()
        convert(student).save_pretrained(tmp_path / str(price))
        sizes.append(sum(file.stat().st_size for file in (tmp_path / str(price)).glob("*.safetensors")))
    assert sizes[1] < 0.98 * sizes[0]


def test_only_bits_beyond_the_free_ones_have_a_price(make_config):
    student = prepare_qat(tiny_unet(), make_config(recipe=2))
    noise = NoisePrediction()
    with torch.no_grad():
        bits = PricedCodes(noise, student, 1.0)(student, batch()).parts["bits"].item()
        base = noise(student, batch()).total.item()
        for free, paid in ((bits + 0.1, 0.0), (bits - 0.25, 0.25)):
            found = PricedCodes(noise, student, 2.0, free)(student, batch())
            assert found.total.item() == pytest.approx(base + 2 * paid, rel=1e-5)


def test_training_ends_at_the_bytes_asked_for(make_config, tmp_path):
    teacher = tiny_unet().requires_grad_(False)
    config = make_config(recipe=3)
    plan, target = make_plan(teacher, config), 260_000
    rate = codes_rate(plan, teacher, torch.float32, target)
    student = prepare_qat(copy.deepcopy(teacher).requires_grad_(True), config)
    objective = PricedCodes(Distillation(student, teacher), student, 0.3, rate)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    bits = []
    for _ in range(50):
        loss = objective(student, batch())
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        bits.append(loss.parts["bits"].item())
    objective.close()
    convert(student).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert bits[0] > 2 * rate
    assert bits[-1] == pytest.approx(rate, rel=0.05)
    # Where whole rows become alike, zstd takes less than the entropy over the layer.
    assert 0.85 * target < file.stat().st_size < 1.02 * target


def test_a_file_without_room_for_codes_is_refused(make_config):
    unet = tiny_unet()
    with pytest.raises(ValueError, match=r"target_bytes=1000 cannot be reached .*: all but the codes takes \d+ bytes"):
        codes_rate(make_plan(unet, make_config(recipe=2)), unet, torch.float32, 1000)
