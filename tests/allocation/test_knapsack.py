"""The knapsack, against trying every assignment."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_bitsfusion.allocation.knapsack import knapsack


def total(table, bits):
    return sum(table[name][n - 1] for name, n in bits.items())


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_it_is_the_best_of_all_assignments_within_the_budget(seed, layers, widths, share):
    rng = np.random.default_rng(seed)
    names = [f"layer{i}" for i in range(layers)]
    sensitivity = {name: rng.exponential(size=widths).tolist() for name in names}  # more bits do not always lower it
    cost = {name: np.sort(rng.integers(1, 500, widths)).tolist() for name in names}
    every = [dict(zip(names, bits, strict=True)) for bits in itertools.product(range(1, widths + 1), repeat=layers)]
    least, most = (f(total(cost, bits) for bits in every) for f in (min, max))
    budget = int(least + share * (most - least))
    found = knapsack(sensitivity, cost, budget)
    assert list(found) == names and total(cost, found) <= budget
    best = min(total(sensitivity, bits) for bits in every if total(cost, bits) <= budget)
    assert total(sensitivity, found) == pytest.approx(best, rel=1e-12)


def test_at_the_size_of_a_large_model_next_to_nothing_is_left_of_the_budget():
    """Against the relaxation's bound: no assignment is better than the best mixture of assignments."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(7, 16.5, 256))
    harm = np.exp(rng.normal(0, 2, 256)) * sizes**0.3
    sensitivity = {str(i): (harm[i] * 4.0 ** -np.arange(1, 8)).tolist() for i in range(256)}
    cost = {
        str(i): (sizes[i] * np.array([1.54, 2.18, 2.90, 3.68, 4.49, 5.31, 6.18]) / 8).astype(int).tolist()
        for i in range(256)
    }
    budget = int(2 * sizes.sum() / 8)
    found = knapsack(sensitivity, cost, budget)
    assert 0.999 * budget < total(cost, found) <= budget
    d, c = np.array(list(sensitivity.values())), np.array(list(cost.values()))
    bound = max(
        (d + price * c).min(axis=1).sum() - price * budget for price in np.exp(np.linspace(-25, 5, 3000)) * harm.mean()
    )
    assert bound <= total(sensitivity, found) <= 1.005 * bound


def test_a_layer_that_never_changes_the_output_gets_the_fewest_bits_however_much_there_is_to_spend():
    sensitivity = {"dead": [0.0] * 7, "live": [2.0**-n for n in range(7)]}
    cost = {name: [10 * n for n in range(1, 8)] for name in sensitivity}
    assert knapsack(sensitivity, cost, 1000) == {"dead": 1, "live": 7}


def test_a_budget_below_the_smallest_assignment_is_refused():
    with pytest.raises(ValueError, match="no assignment of bits fits into 29 bytes: the smallest takes 30"):
        knapsack({"a": [1.0, 0.5], "b": [1.0, 0.5]}, {"a": [10, 20], "b": [20, 30]}, 29)
    assert knapsack({"a": [1.0, 0.5], "b": [1.0, 0.5]}, {"a": [10, 20], "b": [20, 30]}, 30) == {"a": 1, "b": 1}
