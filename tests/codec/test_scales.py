import itertools

import numpy as np
import pytest
import torch

from diffusers_bitsfusion.codec.grid import code_range, half_range
from diffusers_bitsfusion.codec.quantize_dense import quantize_to_dense
from diffusers_bitsfusion.codec.radix import unpack_dense
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.codec.scales import quantize_rows

pytestmark = pytest.mark.usefixtures("one_thread")

BALANCED_OPTIMUM = {1: 0.19017, 2: 0.08218, 3: 0.03070, 4: 0.01041}
UNBALANCED_OPTIMUM = {1: 0.595, 2: 0.149, 3: 0.041}


def through_dense(weight, bits, *options):
    dense, scale = quantize_to_dense(weight, bits, *options)
    return unpack_dense(dense, bits, weight.shape[1]), scale


both_ways = pytest.mark.parametrize("quantize", [quantize_rows, through_dense])


def random_weight(distribution, rows, columns, seed=0):
    generator = np.random.default_rng(seed)
    sample = getattr(generator, distribution)
    limits = (-1.0, 1.0) if distribution == "uniform" else (0.0, 1.0)
    return torch.from_numpy(sample(*limits, size=(rows, columns)).astype(np.float32))


def squared_error(weight, codes, scale):
    return float((scale.double()[:, None] * codes.double() - weight.double()).square().mean())


def round_to_grid(weight, scale, bits, balance=True):
    """Codes of float64 rows, in numpy."""
    low, high = code_range(bits, balance)
    return np.clip(np.rint(weight / scale[:, None]), low, high)


def one_round(weight, scale, bits, balance=True):
    """s <- <w, k> / <k, k> with k = clip(round(w / s)), in numpy."""
    codes = round_to_grid(weight, scale, bits, balance)
    return (weight * codes).sum(1) / (codes * codes).sum(1)


def error_of_best_scale(row, bits):
    """Brute force over scales in steps of half a percent."""
    largest = np.abs(row).max() / half_range(bits)
    scales = largest * np.exp(np.arange(np.log(0.05), np.log(1.6), 0.005))
    return min(np.square(s * round_to_grid(row[None], np.array([s]), bits) - row).mean() for s in scales)


@pytest.fixture(scope="module")
def million():
    return random_weight("normal", 8, 125_000)


@both_ways
@pytest.mark.parametrize("bits", BALANCED_OPTIMUM)
def test_a_unit_gaussian_reaches_the_optimum_of_the_balanced_grid(million, quantize, bits):
    error = squared_error(million, *quantize(million, bits))
    assert error == pytest.approx(BALANCED_OPTIMUM[bits], rel=0.005)


@both_ways
@pytest.mark.parametrize("bits", UNBALANCED_OPTIMUM)
def test_a_unit_gaussian_reaches_the_optimum_of_the_unbalanced_grid(million, quantize, bits):
    codes, scale = quantize(million, bits, Rounding(balance=False))
    assert (int(codes.min()), int(codes.max())) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert squared_error(million, codes, scale) == pytest.approx(UNBALANCED_OPTIMUM[bits], rel=0.01)


@both_ways
@pytest.mark.parametrize(("bits", "scale"), [(1, 1.224), (2, 0.842), (3, 0.533), (4, 0.319)])
def test_the_scale_of_a_unit_gaussian_is_the_known_one(million, quantize, bits, scale):
    assert quantize(million, bits)[1].numpy() == pytest.approx(np.full(8, scale), rel=0.01)


@both_ways
def test_the_start_is_better_than_min_max_at_17_levels(million, quantize):
    rows = million.double().numpy()
    scale = np.abs(rows).max(1) / 8
    for _ in range(10):
        scale = one_round(rows, scale, 4)
    from_min_max = np.square(scale[:, None] * round_to_grid(rows, scale, 4) - rows).mean()
    assert from_min_max > 0.012
    assert squared_error(million, *quantize(million, 4)) < 0.9 * from_min_max


@both_ways
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("balance", [True, False])
def test_each_round_does_what_the_paper_says(quantize, bits, balance):
    weight = random_weight("normal", 6, 2001, seed=1)
    rows = weight.double().numpy()
    previous = quantize(weight, bits, Rounding(iterations=0, balance=balance))[1].double().numpy()
    for rounds in range(1, 5):
        codes, scale = quantize(weight, bits, Rounding(iterations=rounds, balance=balance))
        scale = scale.double().numpy()
        assert scale == pytest.approx(one_round(rows, previous, bits, balance), rel=1e-4)
        # A weight half-way between two codes may go either way: fp32 divides, the reference is exact.
        off = np.abs(codes.numpy() - round_to_grid(rows, scale, bits, balance))
        assert off.max() <= 1 and off.mean() < 1e-3
        previous = scale


@both_ways
@pytest.mark.parametrize("bits", range(1, 8))
def test_more_rounds_never_hurt(quantize, bits):
    weight = random_weight("laplace", 1, 5000, seed=2)
    errors = [
        squared_error(weight, *quantize(weight, bits, Rounding(iterations=rounds))) for rounds in (0, 1, 2, 5, 10, 30)
    ]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors))


@both_ways
@pytest.mark.parametrize("distribution", ["uniform", "laplace", "normal"])
@pytest.mark.parametrize("bits", range(1, 8))
def test_the_scale_is_close_to_the_best_one(quantize, distribution, bits):
    weight = random_weight(distribution, 1, 4000, seed=3)
    best = error_of_best_scale(weight[0].double().numpy(), bits)
    assert squared_error(weight, *quantize(weight, bits)) <= 1.05 * best


@both_ways
@pytest.mark.parametrize("bits", range(1, 9))
def test_min_max_puts_the_largest_weight_on_the_last_level(quantize, bits):
    weight = random_weight("normal", 5, 777, seed=4)
    rows = weight.double().numpy()
    codes, scale = quantize(weight, bits, Rounding(scale_init="minmax"))
    expected = np.abs(rows).max(1) / half_range(bits)
    assert scale.numpy() == pytest.approx(expected, rel=1e-6)
    assert (codes.numpy() == round_to_grid(rows, scale.double().numpy(), bits)).mean() > 0.999
    assert (codes.abs().amax(dim=1) == half_range(bits)).all()


@both_ways
@pytest.mark.parametrize("bits", range(1, 8))
def test_weights_on_a_grid_come_back_exactly(quantize, bits):
    half = half_range(bits)
    codes = torch.arange(-half, half + 1).repeat(3, 40)
    weight = codes * torch.tensor([[0.5], [0.0625], [2.0]])
    found, scale = quantize(weight, bits)
    assert torch.equal(found * scale[:, None], weight)


@both_ways
@pytest.mark.parametrize("options", [{}, {"balance": False}, {"scale_init": "minmax"}, {"iterations": 0}])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_of_zeros_gets_zero_codes_and_scale_one(quantize, bits, options):
    weight = random_weight("normal", 3, 33)
    weight[1] = 0
    codes, scale = quantize(weight, bits, Rounding(**options))
    assert not codes[1].any()
    assert scale[1] == 1
    assert codes[0].any() and codes[2].any()


@both_ways
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale_init", ["alternating", "minmax"])
def test_a_weight_that_is_not_finite_is_refused_with_its_channel(quantize, value, dtype, scale_init):
    weight = random_weight("normal", 6, 50).to(dtype)
    weight[4, 17] = value
    with pytest.raises(ValueError, match="output channel 4 holds NaN or infinite values"):
        quantize(weight, 2, Rounding(scale_init=scale_init))


@both_ways
def test_each_channel_stands_alone(quantize):
    weight = random_weight("normal", 40, 3000, seed=5) * torch.logspace(-3, 3, 40)[:, None]
    codes, scale = quantize(weight, 3)
    for row in (0, 17, 39):
        alone_codes, alone_scale = quantize(weight[row : row + 1], 3)
        assert torch.equal(codes[row], alone_codes[0])
        assert torch.equal(scale[row], alone_scale[0])


@both_ways
def test_a_scaled_row_gets_the_scaled_scale_and_the_same_codes(quantize):
    weight = random_weight("normal", 4, 500, seed=6)
    codes, scale = quantize(weight, 2)
    scaled_codes, scaled_scale = quantize(weight * 0.0078125, 2)
    assert torch.equal(codes, scaled_codes)
    assert torch.equal(scale * 0.0078125, scaled_scale)


@both_ways
def test_columns_of_a_transposed_weight_are_read_in_their_own_order(quantize):
    weight = random_weight("normal", 31, 17, seed=7)
    codes, scale = quantize(weight.T, 3)
    expected_codes, expected_scale = quantize(weight.T.contiguous(), 3)
    assert torch.equal(codes, expected_codes)
    torch.testing.assert_close(scale, expected_scale)


@both_ways
@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_of_any_size_are_rounded_as_those_of_size_one(quantize, bits, balance):
    weight = random_weight("normal", 1, 400, seed=8).expand(6, -1)
    powers = torch.tensor([0.0, -100, -73, 60, 100, -41])  # of two: from 1e-30 to 1e30
    scaled = torch.ldexp(weight, powers.int()[:, None])
    codes, scale = quantize(scaled, bits, Rounding(balance=balance))
    assert torch.equal(codes, codes[:1].expand(6, -1))
    assert torch.equal(scale, torch.ldexp(scale[:1].expand(6), powers.int()))


@both_ways
@pytest.mark.parametrize("scale_init", ["alternating", "minmax"])
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e-30, 1e-22, 1e-7, 1e18, 1e30, 3e38])
def test_scales_are_positive_normal_numbers_and_weights_finite(quantize, scale_init, size):
    weight = random_weight("uniform", 5, 100, seed=9) * torch.tensor(size)
    weight[1] = torch.tensor(size)
    weight[2, 1:] = 0
    for bits in range(1, 9):
        codes, scale = quantize(weight, bits, Rounding(scale_init=scale_init))
        assert (scale >= torch.finfo(torch.float32).tiny).all() and torch.isfinite(scale).all()
        assert torch.isfinite(codes * scale[:, None]).all()
        if size >= 1e-30:
            error = (codes.double() * scale.double()[:, None] - weight.double()).norm() / weight.double().norm()
            assert error < 0.6 / bits


@both_ways
@pytest.mark.parametrize("exponent", [-24, -14, 0, 14])
def test_half_precision_weights_of_any_size_are_rounded(quantize, exponent):
    weight = torch.tensor([[-1.0, 0.0, 1.0, 1.0]]).mul(2.0**exponent).half()
    codes, scale = quantize(weight, 1)
    assert torch.equal(codes * scale[:, None], weight.float())


@both_ways
def test_no_rows_give_none(quantize):
    codes, scale = quantize(torch.empty(0, 7), 3)
    assert codes.shape == (0, 7) and scale.shape == (0,)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_compiled_and_plain_rounding_agree_to_the_bit(bits, balance):
    generator, rounding = torch.Generator().manual_seed(bits), Rounding(balance=balance)
    weights = [
        torch.randn(40, 1501, generator=generator) * 0.02,
        torch.rand(40, 333, generator=generator) - 0.5,
        torch.randn(40, 64, generator=generator) ** 3,
        torch.randn(40, 1, generator=generator),  # one column
        torch.randn(40, 1, generator=generator).expand(-1, 30),  # rows of equal weights
        torch.randint(-9, 10, (40, 45), generator=generator).float(),  # many ties
        torch.randn(40, 77, generator=generator) * 1e-25,
    ]
    for weight in weights:
        for found, expected in zip(
            through_dense(weight, bits, rounding), quantize_rows(weight, bits, rounding), strict=True
        ):
            assert torch.equal(found, expected)
