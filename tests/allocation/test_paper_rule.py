"""The paper's rule, against a plain statement of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_bitsfusion.allocation.paper_rule import paper_rule


def log2_cost(sizes):
    return {name: [math.log2(2**n + 1) * size for n in range(1, 8)] for name, size in sizes.items()}


def by_the_paper(sensitivity, sizes, threshold, eta, clip_drop):
    """Section 5, sentence by sentence."""
    bits = {}
    for name, size in sizes.items():
        bits[name] = 4
        for b in (3, 2, 1):
            if sensitivity[b][name] * size ** (-eta) < threshold:
                bits[name] = b
    if clip_drop:
        drops = np.array(list(clip_drop.values()))
        for percentile in (90, 95, 98):
            bound = np.percentile(drops, percentile)
            for name in sizes:
                if clip_drop[name] > bound:
                    bits[name] += 1
    return bits


@st.composite
def cases(draw):
    count = draw(st.integers(1, 40))
    names = [f"layer{i}" for i in range(count)]
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    sizes = {name: int(size) for name, size in zip(names, rng.integers(10, 10**6, count), strict=True)}
    worst = np.exp(rng.normal(size=count))
    sensitivity = {
        b: dict(zip(names, (worst * 2.0**-b * rng.uniform(0.5, 1.5, count)).tolist(), strict=True)) for b in (1, 2, 3)
    }
    drops = dict(zip(names, rng.uniform(0.01, 1, count).tolist(), strict=True)) if draw(st.booleans()) else None
    return sensitivity, sizes, drops, draw(st.sampled_from([0.0, 0.3, 0.5])), draw(st.floats(0, 1))


@given(cases())
@settings(deadline=None, max_examples=60)
def test_it_is_the_papers_assignment_at_the_strictest_threshold_that_fits(case):
    sensitivity, sizes, drops, eta, share = case
    cost = log2_cost(sizes)

    def spent(bits):
        return sum(cost[name][n - 1] for name, n in bits.items())

    scores = sorted({sensitivity[b][name] * size**-eta for b in (1, 2, 3) for name, size in sizes.items()})
    every = [by_the_paper(sensitivity, sizes, threshold, eta, drops) for threshold in [*scores, math.inf]]
    least, most = min(map(spent, every)), max(map(spent, every))
    budget = min(least + share * (most - least), most)  # Rounding may bring the sum above the most that can be spent.
    found = paper_rule(sensitivity, sizes, cost, budget, eta=eta, clip_drop=drops)
    assert found in every
    assert spent(found) == max(spent(bits) for bits in every if spent(bits) <= budget)


def test_the_clip_percentiles_add_one_bit_each():
    sizes = {f"layer{i}": 100 for i in range(101)}
    sensitivity = {b: dict.fromkeys(sizes, 1.0 / b) for b in (1, 2, 3)}
    drops = {name: float(i) for i, name in enumerate(sizes)}
    cost = log2_cost(sizes)
    bits = paper_rule(sensitivity, sizes, cost, sum(c[0] for c in cost.values()) * 1.2, clip_drop=drops)
    assert [bits[f"layer{i}"] for i in (0, 90, 91, 95, 96, 98, 99, 100)] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_layer_that_never_changes_the_output_gets_one_bit():
    sizes = {"dead": 10, **{f"layer{i}": 1000 for i in range(9)}}
    sensitivity = {b: {name: 0.0 if name == "dead" else 1.0 for name in sizes} for b in (1, 2, 3)}
    drops = {name: 0.0 if name == "dead" else -1.0 for name in sizes}
    cost = {name: [float(n) for n in range(1, 8)] for name in sizes}
    bits = paper_rule(sensitivity, sizes, cost, 9 * 4 + 1, clip_drop=drops)
    assert bits.pop("dead") == 1 and set(bits.values()) == {4}


def test_larger_layers_get_fewer_bits_the_larger_eta_is():
    sizes = {"small": 100, "large": 100_000}
    sensitivity = {b: {"small": 0.9 * 4.0**-b, "large": 4.0**-b} for b in (1, 2, 3)}
    cost = {name: [float(n) for n in range(1, 8)] for name in sizes}
    assert paper_rule(sensitivity, sizes, cost, 5, eta=0.0) == {"small": 2, "large": 3}
    assert paper_rule(sensitivity, sizes, cost, 5, eta=0.3) == {"small": 3, "large": 2}


@pytest.mark.parametrize("average", [1.5, 4.2])
def test_a_budget_out_of_reach_is_refused_with_what_is_in_reach(average):
    sizes = {"a": 100, "b": 300}
    sensitivity = {b: {"a": 1.0 / b, "b": 2.0 / b} for b in (1, 2, 3)}
    with pytest.raises(ValueError, match=rf"spends {average:.3f} a weight over 2 layers: it spends 1\.585 to 4\.087"):
        paper_rule(sensitivity, sizes, log2_cost(sizes), average * 400)
