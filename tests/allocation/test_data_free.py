import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_bitsfusion.allocation.data_free import allocate_data_free

# Squared error of a unit Gaussian on its best grid, by numerical minimisation.
GAUSSIAN_ERROR = {1: 0.190174, 2: 0.082178, 3: 0.030696, 4: 0.010405, 5: 0.003313, 6: 0.001012, 7: 0.000300}


def cost(sizes, bits, balance=True):
    return sum((math.log2(2**n + 1) if balance else n) * sizes[name] for name, n in bits.items())


def error(bits):
    return sum(GAUSSIAN_ERROR[n] for n in bits.values())


sizes_and_average = st.tuples(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=30), st.floats(math.log2(3) + 1e-6, 7.0)
)


@given(sizes_and_average)
@settings(deadline=None)
def test_the_budget_is_kept_and_no_further_bit_fits(case):
    counts, average = case
    sizes = {f"layer{i}": count for i, count in enumerate(counts)}
    budget = average * sum(counts)
    bits = allocate_data_free(sizes, budget)
    assert set(bits) == set(sizes)
    assert set(bits.values()) <= set(range(1, 8))
    assert cost(sizes, bits) <= budget * (1 + 1e-9)
    for name in sizes:
        if bits[name] < 7:
            assert cost(sizes, bits | {name: bits[name] + 1}) > budget * (1 - 1e-9)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=4), st.floats(1.6, 6.9))
@settings(deadline=None, max_examples=25)
def test_the_error_is_within_one_step_of_the_best_assignment(counts, average):
    sizes = {f"layer{i}": count for i, count in enumerate(counts)}
    budget = average * sum(counts)
    every = (dict(zip(sizes, bits, strict=True)) for bits in itertools.product(range(1, 8), repeat=len(sizes)))
    best = min(error(bits) for bits in every if cost(sizes, bits) <= budget)
    found = allocate_data_free(sizes, budget)
    # The greedy answer to a convex knapsack misses the optimum by less than the step that no longer fitted.
    left_out = max((GAUSSIAN_ERROR[n] - GAUSSIAN_ERROR[n + 1] for n in found.values() if n < 7), default=0.0)
    assert error(found) <= best + left_out + 1e-12


@given(sizes_and_average)
@settings(deadline=None)
def test_a_smaller_layer_never_gets_fewer_bits(case):
    counts, average = case
    sizes = {f"layer{i}": count for i, count in enumerate(counts)}
    bits = allocate_data_free(sizes, average * sum(counts))
    ordered = sorted(sizes, key=sizes.get)
    for small, large in itertools.pairwise(ordered):
        if sizes[small] < sizes[large]:
            assert bits[small] >= bits[large]


def test_bits_fall_by_half_a_bit_to_one_bit_a_doubling():
    sizes = {f"2**{k}": 2**k for k in range(8, 24)}
    bits = list(allocate_data_free(sizes, 2.2 * sum(sizes.values())).values())
    inner = [i for i, n in enumerate(bits) if 1 < n < 7]
    slope = (bits[inner[0]] - bits[inner[-1]]) / (inner[-1] - inner[0])
    assert 0.5 <= slope <= 1


def test_more_budget_never_makes_the_error_larger():
    sizes = {"a": 7000, "b": 900, "c": 40_000, "d": 123, "e": 40_001}
    errors = [error(allocate_data_free(sizes, average * 88_024)) for average in (1.6, 1.8, 2.0, 2.5, 3, 4, 5, 6, 7)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("bits", [1, 7])
def test_the_ends_of_the_range_are_reached(balance, bits):
    sizes = {"a": 1280, "b": 33, "c": 921_600, "d": 5}
    uniform = dict.fromkeys(sizes, bits)
    assert allocate_data_free(sizes, cost(sizes, uniform, balance), balance=balance) == uniform


def test_plain_grids_are_cheaper_and_get_more_bits_for_the_same_budget():
    sizes = {f"layer{i}": 1000 + i for i in range(50)}
    budget = 2.0 * sum(sizes.values())
    plain = allocate_data_free(sizes, budget, balance=False)
    assert cost(sizes, plain, balance=False) <= budget
    assert sum(plain.values()) > sum(allocate_data_free(sizes, budget).values())


@pytest.mark.parametrize("average", [0.5, 1.58, 7.02, 16.0, -1.0])
def test_a_budget_out_of_reach_is_refused_with_what_is_in_reach(average):
    with pytest.raises(ValueError, match=r"1\.585 to 7\.011") as failure:
        allocate_data_free({"a": 100, "b": 300}, average * 400)
    assert f"{average:.3f} bits a weight over 2 layers" in str(failure.value)


def test_the_answer_does_not_depend_on_the_order_of_the_layers():
    sizes = {f"layer{i}": 100 * (1 + i % 7) for i in range(40)}
    backwards = dict(reversed(sizes.items()))
    budget = 2.3 * sum(sizes.values())
    assert allocate_data_free(sizes, budget) == allocate_data_free(backwards, budget)
