"""Codes by error and bits, against brute force; a layer at a given number of bits a weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_bitsfusion.calibration.compensated_rounding import factorize
from diffusers_bitsfusion.calibration.rate_target import quantize_rows_at_rate
from diffusers_bitsfusion.codec.entropy import compress
from diffusers_bitsfusion.codec.radix import pack_bytes
from diffusers_bitsfusion.codec.rate_distortion import cheap_codes, symbol_bits
from diffusers_bitsfusion.codec.scales import quantize_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def bits_a_weight(codes, bits: int) -> float:
    return 8 * compress(pack_bytes(codes, bits)).numel() / codes.numel()


def test_codes_are_the_candidates_of_least_error_and_price():
    values = 3 * gaussian(1, 400)[0]
    prices = 2 * torch.rand(9, generator=torch.Generator().manual_seed(1))
    codes = cheap_codes(values, prices)
    for value, code in zip(values.tolist(), codes.tolist(), strict=True):
        nearest = int(np.clip(round(value), -4, 4))
        candidates = {nearest, nearest - int(np.sign(nearest)), 0}
        cost = {k: (value - k) ** 2 + float(prices[k + 4]) for k in candidates}
        assert cost[int(code)] == pytest.approx(min(cost.values()), rel=1e-5)
    assert (codes != values.round().clamp(-4, 4)).any()


def test_symbols_cost_minus_the_logarithm_of_their_share():
    codes = torch.tensor([0, 0, 0, 1, -1, 0], dtype=torch.int8)
    shares = np.array([1, 4, 1]) + 0.5  # half a code more of each level
    assert np.allclose(symbol_bits(codes, 1), -np.log2(shares / shares.sum()))


@pytest.mark.parametrize(("rate", "bits"), [(1.2, 3), (1.6, 3), (2.8, 4), (4.5, 6)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_codes_take_the_bits_that_they_may(rate, bits, calibrated):
    weight = gaussian(96, 256)
    inputs = gaussian(500, 256, seed=2).cumsum(dim=1)
    factors = [factorize(inputs.T @ inputs / 500)] if calibrated else []
    codes, scale = quantize_rows_at_rate(weight, factors, bits, rate)
    assert 0.98 * rate < bits_a_weight(codes, bits) <= rate
    if not calibrated:  # the scale is the least-squares gain of each row
        kept = codes.double()
        expected = (weight.double() * kept).sum(1) / kept.square().sum(1)
        assert torch.allclose(scale.double(), expected, rtol=1e-5)


def test_a_wide_grid_has_less_error_than_three_levels_in_no_more_bytes():
    weight = gaussian(256, 512)
    narrow, narrow_scale = quantize_rows(weight, 1)
    wide, wide_scale = quantize_rows_at_rate(weight, [], 3, bits_a_weight(narrow, 1))
    errors = [
        float((weight - s.unsqueeze(1) * k).square().mean()) for k, s in ((narrow, narrow_scale), (wide, wide_scale))
    ]
    assert bits_a_weight(wide, 3) <= bits_a_weight(narrow, 1) and errors[1] < 0.98 * errors[0]


def test_rows_of_zeros_and_of_any_size():
    weight = gaussian(4, 300)
    weight[1], weight[2] = 0, weight[2] * 1e-30
    codes, scale = quantize_rows_at_rate(weight, [], 3, 2.0)
    assert not codes[1].any() and scale[1] == 1 and codes[2].any()
    assert torch.isfinite(scale).all() and (scale > 0).all()
    weight[3, 5] = torch.inf
    with pytest.raises(ValueError, match="output channel 3"):
        quantize_rows_at_rate(weight, [], 3, 2.0)
