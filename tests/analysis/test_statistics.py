"""Correlations over the layers, against other implementations."""

from __future__ import annotations

import numpy as np
import pytest

from diffusers_bitsfusion.analysis.results import Analysis
from diffusers_bitsfusion.analysis.statistics import metric_correlations, rank_correlations, width_correlations


@pytest.fixture
def two(make_analysis):
    rng = np.random.default_rng(0)
    layers = {f"layer{i}": (100, tuple(rng.integers(1, 12, 3) / 8)) for i in range(30)}  # many ties
    other = {
        name: (size, tuple(np.array(sensitivity) + rng.normal(size=3) / 2))
        for name, (size, sensitivity) in layers.items()
    }
    drops = {name: float(rng.normal()) for name in layers}
    return make_analysis(layers, drops), make_analysis(other)


def test_ranks_are_spearmans(two):
    spearman = pytest.importorskip("torchmetrics.functional").spearman_corrcoef
    torch = pytest.importorskip("torch")
    found = rank_correlations(*two)
    assert list(found) == ["1", "2", "3", "all"]
    columns = [[torch.tensor(list(analysis.damage(bits).values())) for bits in (1, 2, 3)] for analysis in two]
    for bits in (1, 2, 3):
        assert found[str(bits)] == pytest.approx(spearman(columns[0][bits - 1], columns[1][bits - 1]).item(), abs=1e-6)
    assert found["all"] == pytest.approx(spearman(torch.cat(columns[0]), torch.cat(columns[1])).item(), abs=1e-6)
    assert rank_correlations(two[0], two[0]) == pytest.approx(dict.fromkeys(found, 1.0))


def test_tables_are_absolute_pearson(two):
    analysis = two[0]
    names, matrix = metric_correlations(analysis, 2)
    mse, drop = analysis.metric("mse", 2), analysis.metric("clip_drop", 2)
    covariance = ((mse - mse.mean()) * (drop - drop.mean())).mean() / (mse.std() * drop.std())
    assert names == ["mse", "clip_drop"]
    assert np.allclose(matrix, [[1, abs(covariance)], [abs(covariance), 1]])
    assert width_correlations(analysis, "mse").shape == (3, 3)
    expected = np.corrcoef(analysis.metric("mse", 1), analysis.metric("mse", 3))[0, 1]
    assert width_correlations(analysis, "mse")[0, 2] == pytest.approx(abs(expected))


def test_layers_of_infinite_psnr_are_left_out(full):
    names, matrix = metric_correlations(full, 1)
    assert np.isfinite(matrix).all() and names[:2] == ["mse", "psnr"]
    mse, psnr = full.metric("mse", 1), full.metric("psnr", 1)
    finite = np.isfinite(psnr)
    assert 0 < finite.sum() < len(finite)
    assert matrix[0, 1] == pytest.approx(abs(np.corrcoef(mse[finite], psnr[finite])[0, 1]))


def test_analyses_of_other_models_or_widths_have_no_common_ranks(two, make_analysis):
    with pytest.raises(ValueError, match="of another model: the other one lacks layer0"):
        rank_correlations(two[0], make_analysis({"layer1": (100, (3.0, 2.0, 1.0))}))
    narrow = Analysis(type(two[0].header)(**(two[0].header.__dict__ | {"bits": (1, 2)})), two[0].records)
    with pytest.raises(ValueError, match=r"have bits \(1, 2, 3\) and \(1, 2\)"):
        rank_correlations(two[0], narrow)
