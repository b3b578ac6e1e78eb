"""Layers are spread over runs of the pipeline so that the stated memory is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusers_bitsfusion.calibration.layers import rounding_bytes
from diffusers_bitsfusion.calibration.moments import InputMoments, moment_bytes
from diffusers_bitsfusion.calibration.passes import MAX_COLUMNS, plan_passes

with torch.device("meta"):
    LAYERS = {f"conv{i}": nn.Conv2d(64, 64, 3) for i in range(6)} | {
        f"linear{i}": nn.Linear(256, 64) for i in range(6)
    }
    WIDE = {"wide": nn.Conv2d(2560, 1280, 3)}


def held(layer, max_columns) -> int:
    """Bytes of a layer's moments, counted in the tensors themselves."""
    moments = InputMoments(layer, max_columns)
    tensors = [moments.total, *(product.values for product in moments.products)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak(layers, passes) -> int:
    """The most that moments and rounding take together, as layers are rounded in order and give their moments back."""
    most = 0
    for names in passes.groups:
        waiting = [held(layers[name], passes.max_columns) for name in names]
        for i, name in enumerate(names):
            most = max(most, sum(waiting[i:]) + rounding_bytes(layers[name], passes.max_columns))
    return most


@pytest.mark.parametrize("megabytes", [4, 6, 10, 100])
def test_every_layer_is_in_one_pass_and_the_memory_is_kept(megabytes):
    passes = plan_passes(LAYERS, megabytes * 1e6)
    assert sorted(name for names in passes.groups for name in names) == sorted(LAYERS)
    assert peak(LAYERS, passes) <= megabytes * 1e6


def test_layers_that_take_most_to_round_come_last():
    (names,) = plan_passes(LAYERS | WIDE, 8e9).groups
    needs = [rounding_bytes((LAYERS | WIDE)[name], MAX_COLUMNS) for name in names]
    assert needs == sorted(needs) and names[-1] == "wide"


def test_less_memory_means_more_passes_and_in_the_end_smaller_blocks():
    plans = [plan_passes(LAYERS, megabytes * 1e6) for megabytes in (100, 10, 4)]
    assert len(plans[0].groups) == 1 < len(plans[1].groups)
    assert plans[0].max_columns == plans[1].max_columns == MAX_COLUMNS > plans[2].max_columns


@pytest.mark.parametrize("gigabytes", [1, 2, 8])
def test_the_widest_convolution_of_stable_diffusion_fits(gigabytes):
    passes = plan_passes(WIDE, gigabytes * 1e9)
    assert peak(WIDE, passes) <= gigabytes * 1e9
    assert moment_bytes(WIDE["wide"], passes.max_columns) < 4 * (2560 * 9) ** 2


def test_too_little_memory_says_how_much_is_needed():
    with pytest.raises(ValueError, match=r"memory_gb=0.001 is too little.* needs 0.7"):
        plan_passes(WIDE, 1e6)


def test_rounding_needs_no_more_memory_than_it_says(run_python):
    """In a fresh process, on a layer large beside what the interpreter takes."""
    code = """
import torch
from torch import nn
from benchmarks.measure import peak_rss
from diffusers_bitsfusion.calibration.layers import quantize_layer, rounding_bytes
from diffusers_bitsfusion.calibration.moments import InputMoments
from diffusers_bitsfusion.codec.rounding import Rounding
rounding = Rounding(iterations=1)
def run(layer):
    moments = InputMoments(layer, 2000)
    moments.add(torch.randn(64, layer.weight[0].numel()))
    before = peak_rss()
    quantize_layer(layer, moments, 2, rounding)
    return peak_rss() - before
run(nn.Linear(300, 8))  # what libraries allocate once
layer = nn.Linear(2000, 1000)
print(run(layer) / rounding_bytes(layer, 2000))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert 0.2 < float(result.stdout) <= 1
