from __future__ import annotations

import re
import sys
from types import ModuleType

import numpy as np
import pytest

from diffusers_bitsfusion.evaluation import bootstrap_mean, bootstrap_scores, load_scorer
from diffusers_bitsfusion.evaluation import compositional as module


def test_overall_is_the_mean_over_categories():
    scores = bootstrap_scores(np.array([1, 1, 1, 0, 0, 1.0]), ["a", "a", "a", "a", "b", "b"])
    assert list(scores) == ["overall", "a", "b"]
    assert (scores["a"].value, scores["b"].value, scores["overall"].value) == (0.75, 0.5, 0.625)
    for estimate in scores.values():
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    # Half the width of two independent categories together is less than either's alone.
    assert scores["overall"].high - scores["overall"].low < scores["b"].high - scores["b"].low


def test_without_categories_there_is_only_the_overall_mean():
    values = np.array([0, 1, 1.0])
    assert bootstrap_scores(values, [None] * 3)["overall"].value == pytest.approx(2 / 3)
    assert list(bootstrap_scores(values, [None] * 3)) == ["overall"]


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth = np.repeat([0.7, 0.4], 100)
    covered = 0
    for seed in range(100):
        overall = bootstrap_scores((rng.random(200) < truth).astype(float), ["a"] * 100 + ["b"] * 100, seed)["overall"]
        covered += overall.low <= 0.55 <= overall.high
    assert 89 <= covered <= 99


def test_interval_has_the_width_of_the_normal_approximation():
    values = (np.random.default_rng(1).random(600) < 0.8).astype(float)
    estimate = bootstrap_mean(values)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(600), rel=0.1)


def test_the_difference_of_equal_models_is_exactly_zero_and_of_alike_ones_sharp():
    rng = np.random.default_rng(2)
    a = (rng.random(300) < 0.6).astype(float)
    b = np.where(np.arange(300) % 30 == 0, 0, a)  # fails a little more often, on the same prompts
    categories = ["x", "y", "z"] * 100
    same = bootstrap_scores(a - a, categories)
    assert all((e.value, e.low, e.high) == (0, 0, 0) for e in same.values())
    paired = bootstrap_scores(a - b, categories)["overall"]
    assert paired.low > 0 and paired.high - paired.low < 0.5 * np.ptp([bootstrap_mean(a).low, bootstrap_mean(a).high])


def test_the_same_seed_gives_the_same_interval_in_blocks_or_not(monkeypatch):
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(values, seed=5)
    assert bootstrap_mean(values, seed=5) != bootstrap_mean(values, seed=6)
    whole = bootstrap_mean(values)
    monkeypatch.setattr(module, "_BLOCK", 1000)
    assert bootstrap_mean(values) == whole


def test_infinite_values_give_infinite_bounds_not_nan():
    estimate = bootstrap_mean(np.array([np.inf, 20.0, 30.0]))
    assert np.isinf(estimate.value) and np.isinf(estimate.high) and not np.isnan(estimate.low)


def test_a_category_called_overall_is_refused():
    with pytest.raises(ValueError, match="cannot be called 'overall'"):
        bootstrap_scores(np.ones(2), ["overall", "a"])


@pytest.fixture
def plugin(monkeypatch) -> ModuleType:
    plugin = ModuleType("scorer_plugin")
    plugin.bright = lambda images, specs: [image.mean() > spec for image, spec in zip(images, specs, strict=True)]
    monkeypatch.setitem(sys.modules, "scorer_plugin", plugin)
    return plugin


def test_scorers_are_found_by_name_and_judge(plugin):
    scorer = load_scorer("scorer_plugin:bright")
    assert scorer is plugin.bright
    images = np.array([[[[0] * 3]], [[[200] * 3]]], np.uint8)
    assert module.judge(scorer, images, [100, 100]).tolist() == [0.0, 1.0]


def test_a_scorer_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "scorer_of_mine.py").write_text("def all_right(images, specs):\n    return [1.0] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    assert load_scorer("scorer_of_mine:all_right")([0, 0], [1, 2]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bright", "is not written MODULE:FUNCTION"),
        ("no_such_module:score", "cannot be imported"),
        ("scorer_plugin:dim", "has no function 'dim'"),
    ],
)
def test_scorers_that_are_not_there(plugin, name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_scorer(name)


@pytest.mark.parametrize("answer", [[1.0], [1.0, float("nan")], 1.0])
def test_scorers_must_return_a_number_an_image(answer):
    with pytest.raises(ValueError, match="must return 2 finite numbers"):
        module.judge(lambda images, specs: answer, np.zeros((2, 1, 1, 3), np.uint8), [0, 0])
