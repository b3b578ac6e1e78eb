"""Compensated rounding, against the optimal brain formulas written out with an explicit inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_bitsfusion.calibration.compensated_rounding import DAMPING, factorize, project, round_with_compensation
from diffusers_bitsfusion.calibration.input_weighted_scales import RATE, quantize_rows_for_inputs
from diffusers_bitsfusion.codec.grid import code_range
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.codec.scales import quantize_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def correlated_moment(size: int, seed: int = 0, samples: int | None = None) -> torch.Tensor:
    """Second moment of `samples` inputs that depend on each other and differ in strength."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(size, size, generator=generator).cumsum(dim=1) * torch.rand(size, generator=generator)
    inputs = torch.randn(samples or 4 * size, size, generator=generator) @ mixed.T
    return inputs.T @ inputs / len(inputs)


def random_weight(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def output_error(weight, codes, scale, moment) -> torch.Tensor:
    error = (weight - scale.unsqueeze(1) * codes).double()
    return ((error @ moment.double()) * error).sum(dim=1)


def optimal_brain_codes(weight, moment, scale, low, high):
    """Column by column: round, then move all columns that are left to where the output changes least."""
    weight, moment = weight.double().numpy().copy(), moment.double().numpy()
    damped = moment + DAMPING * moment.diagonal().mean() * np.eye(len(moment))
    codes = np.zeros_like(weight)
    left = list(np.argsort(moment.diagonal()))  # the strongest input is rounded first
    while left:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        column = left[-1]
        codes[:, column] = np.clip(np.round(weight[:, column] / scale), low, high)
        error = weight[:, column] - scale * codes[:, column]
        weight[:, left] -= np.outer(error / inverse[-1, -1], inverse[-1])
        left.pop()
    return codes


@pytest.mark.parametrize(("bits", "balance"), [(1, True), (2, True), (2, False), (3, True)])
def test_codes_are_those_of_the_optimal_brain_formula(bits, balance):
    weight, moment = random_weight(6, 150), correlated_moment(150)  # more columns than are rounded at once
    scale = weight.abs().mean(dim=1)
    codes, _ = round_with_compensation(weight, [factorize(moment)], scale, bits, balance=balance)
    expected = optimal_brain_codes(weight, moment, scale.double().numpy(), *code_range(bits, balance))
    assert np.array_equal(codes.numpy(), expected)


@pytest.mark.parametrize("moment", [torch.eye(40), torch.zeros(40, 40)], ids=["identity", "zeros"])
def test_inputs_without_correlations_or_unseen_give_plain_rounding(moment):
    weight = random_weight(8, 40)
    codes, scale = quantize_rows(weight, 2)
    compensated, _ = round_with_compensation(weight, [factorize(moment)], scale, 2)
    assert torch.equal(compensated, codes)


def test_squares_of_the_residual_are_the_output_error_under_the_damped_moment():
    weight, moment = random_weight(8, 40), correlated_moment(40)
    factor, scale = factorize(moment), weight.abs().mean(dim=1)
    codes, residual = round_with_compensation(weight, [factor], scale, 2)
    damped = moment + DAMPING * moment.diagonal().mean() * torch.eye(40)
    assert torch.allclose(residual.square().sum(1).double(), output_error(weight, codes, scale, damped), rtol=1e-4)
    reached = project(weight - scale.unsqueeze(1) * codes, [factor])
    assert torch.allclose(residual, reached, atol=1e-4 * float(reached.abs().max()))


def test_blocks_are_rounded_each_on_its_own():
    weight, scale = random_weight(5, 60), torch.ones(5)
    first, second = correlated_moment(20), correlated_moment(40, seed=3)
    codes, residual = round_with_compensation(weight, [factorize(first), factorize(second, start=20)], scale, 3)
    for columns, moment in ((slice(0, 20), first), (slice(20, 60), second)):
        alone, left = round_with_compensation(weight[:, columns], [factorize(moment)], scale, 3)
        assert torch.equal(codes[:, columns], alone) and torch.equal(residual[:, columns], left)


def test_fewer_samples_than_columns_are_damped():
    weight, moment = random_weight(4, 64), correlated_moment(64, samples=5)  # rank 5
    codes, scale = quantize_rows_for_inputs(weight, [factorize(moment)], 2)
    plain, plain_scale = quantize_rows(weight, 2)
    assert torch.isfinite(scale).all()
    assert (output_error(weight, codes, scale, moment) < output_error(weight, plain, plain_scale, moment)).all()


def test_damping_grows_until_an_indefinite_moment_can_be_factorized():
    moment = torch.full((4, 4), -0.5) + 1.5 * torch.eye(4)  # smallest eigenvalue -0.5: rounding errors, exaggerated
    upper = factorize(moment).upper
    added = (upper.T @ upper - moment).diagonal()
    assert torch.isfinite(upper).all() and (added > 0.5).all()


def bits_of_entropy(codes) -> np.ndarray:
    """Entropy of each row's codes, bits a weight."""
    counts = [np.unique(row, return_counts=True)[1] / len(row) for row in np.asarray(codes)]
    return np.array([-(shares * np.log2(shares)).sum() for shares in counts])


def cost(weight, codes, scale, moment) -> np.ndarray:
    """What rows are chosen by, in bits a weight; -inf for a row without an error."""
    error = output_error(weight, codes, scale, moment).numpy()
    with np.errstate(divide="ignore"):
        return 0.5 * np.log2(error) + RATE * bits_of_entropy(codes)


@pytest.mark.parametrize(("bits", "balance"), [(1, True), (2, True), (2, False), (3, True)])
def test_rows_are_the_candidates_of_least_error_and_entropy(bits, balance):
    weight, moment = random_weight(6, 40), correlated_moment(40)
    damped = moment + DAMPING * moment.diagonal().mean() * torch.eye(40)
    levels = code_range(bits, balance)
    codes, scale = quantize_rows(weight, bits, Rounding(balance=balance))
    first = scale.double().numpy()
    best = [
        (float(cost(weight[[i]], codes[[i]], scale[[i]], damped)[0]), codes[i].numpy(), first[i]) for i in range(6)
    ]

    def attempt(scale) -> None:
        codes = optimal_brain_codes(weight, moment, scale, *levels)
        for i, (row, exact) in enumerate(zip(codes, weight.double().numpy(), strict=True)):
            refit = row @ damped.double().numpy() @ exact / (row @ damped.double().numpy() @ row)
            found = cost(weight[[i]], torch.from_numpy(row)[None], torch.tensor([refit]), damped)[0]
            if found < best[i][0]:
                best[i] = found, row, refit

    for multiple in (1.0, 0.9, 1.1, 1.25, 1.45):
        attempt(first * multiple)
    for _ in range(2):
        attempt(np.array([scale for _, _, scale in best]))
    codes, scale = quantize_rows_for_inputs(weight, [factorize(moment)], bits, Rounding(balance=balance))
    assert np.array_equal(codes.numpy(), [row for _, row, _ in best])
    assert np.allclose(scale, [scale for _, _, scale in best], rtol=1e-5)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_error_and_entropy_are_never_worse_than_plain_roundings_and_the_error_mostly_far_below(bits, balance):
    weight = random_weight(24, 80)
    weight[3] = 0  # a dead channel
    moment = correlated_moment(80)
    damped = moment + DAMPING * moment.diagonal().mean() * torch.eye(80)
    codes, scale = quantize_rows_for_inputs(weight, [factorize(moment)], bits, Rounding(balance=balance))
    low, high = code_range(bits, balance)
    assert codes.dtype == torch.int8 and low <= codes.min() and codes.max() <= high
    nearest = quantize_rows(weight, bits, Rounding(balance=balance))
    assert (cost(weight, codes, scale, damped) <= cost(weight, *nearest, damped) + 1e-4).all()
    plain, found = output_error(weight, *nearest, damped), output_error(weight, codes, scale, damped)
    assert (found <= plain * (1 + 1e-5)).all() and found.sum() < 0.6 * plain.sum()
    assert not codes[3].any() and scale[3] == 1


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_codes_take_fewer_bits_than_those_of_the_scale_of_least_error(bits, monkeypatch):
    weight, moment = random_weight(64, 160), correlated_moment(160)
    codes, _ = quantize_rows_for_inputs(weight, [factorize(moment)], bits)
    monkeypatch.setattr("diffusers_bitsfusion.calibration.input_weighted_scales.RATE", 0.0)
    least, _ = quantize_rows_for_inputs(weight, [factorize(moment)], bits)
    assert bits_of_entropy(codes).mean() < bits_of_entropy(least).mean() - 0.02


def test_nan_weights_are_refused():
    weight = random_weight(3, 8)
    weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match="output channel 1 holds NaN"):
        quantize_rows_for_inputs(weight, [factorize(torch.eye(8))], 2)
