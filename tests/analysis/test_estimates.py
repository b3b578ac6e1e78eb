"""The estimates, each against the same quantity computed by other means."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from tiny_transformers import tiny_sd3
from torch import nn

from diffusers_bitsfusion.analysis import estimates as module
from diffusers_bitsfusion.analysis.layer_cost import temporary_weight
from diffusers_bitsfusion.analysis.recording import Reference, record
from diffusers_bitsfusion.analysis.results import Analysis
from diffusers_bitsfusion.analysis.single_layer import trained_weight
from diffusers_bitsfusion.analysis.statistics import rank_correlations
from diffusers_bitsfusion.analysis.study import Study
from diffusers_bitsfusion.calibration.calls import Call
from diffusers_bitsfusion.calibration.compensated_rounding import factorize
from diffusers_bitsfusion.calibration.input_weighted_scales import quantize_rows_for_inputs
from diffusers_bitsfusion.codec.scales import quantize_rows

from .conftest import CAPTIONS, DEAD, SETTINGS

pytestmark = pytest.mark.usefixtures("one_thread")
LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
STRIDED = "up_blocks.0.resnets.0.conv1"


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    codes, scale = quantize_rows(weight.flatten(1), bits)
    return (codes * scale[:, None]).view_as(weight)


def sample_errors(model, calls) -> np.ndarray:
    """Mean square error of each sample of the calls."""
    with torch.no_grad():
        changes = torch.cat([call.repeat(model) - call.output for call in calls])
    return changes.square().mean(dim=(1, 2, 3)).numpy()


@pytest.fixture
def study(small_pipe) -> Study:
    sampling = SETTINGS.sampling
    reference = record(small_pipe, small_pipe.unet, CAPTIONS, sampling, SETTINGS.calls, progress=False)
    return Study(small_pipe, CAPTIONS, SETTINGS, None, reference)


def test_weight_error_is_the_sum_of_squares(estimates, small_pipe):
    for (name, bits), metrics in estimates["weight"].records.items():
        weight = small_pipe.unet.get_submodule(name).weight.detach()
        expected = np.square((rounded(weight, bits) - weight).numpy()).sum()
        assert metrics["weight_error"] == pytest.approx(expected, rel=1e-4)
        assert estimates["weight"].header.layers[name].weight_error[bits - 1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", [LINEAR, STRIDED])
def test_output_error_is_that_of_the_layers_output_on_its_inputs(estimates, study, name):
    layer, inputs = study.layers[name], []
    with layer.register_forward_hook(lambda layer, args, output: inputs.append(args[0])), torch.no_grad():
        for call in study.reference.calls:
            call.repeat(study.model)
    layer.bias = None
    outputs = torch.cat([layer(x).flatten() for x in inputs])
    for bits in (1, 3):
        other = {"weight": rounded(layer.weight, bits)}
        changed = torch.cat([torch.func.functional_call(layer, other, x).flatten() for x in inputs])
        expected = float((changed - outputs).square().sum() / outputs.square().sum())
        assert estimates["output"].records[name, bits]["output_error"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", [LINEAR, STRIDED])
def test_prediction_error_is_the_change_of_the_models_output(estimates, study, name):
    weight = study.layers[name].weight
    with torch.no_grad():
        weight.copy_(rounded(weight, 2))
        errors = [(call.repeat(study.model) - call.output).square().mean().item() for call in study.reference.calls]
    assert estimates["prediction"].records[name, 2]["prediction_error"] == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize("name", [LINEAR, STRIDED])
def test_calibrated_error_is_that_of_the_layer_calibrated_for_other_calls(estimates, study, name):
    layer, inputs = study.layers[name], []
    first, second = study.reference.calls[::2], study.reference.calls[1::2]
    with layer.register_forward_hook(lambda layer, args, output: inputs.append(args[0])), torch.no_grad():
        for call in first:
            call.repeat(study.model)
    rows = [F.unfold(x, layer.kernel_size, padding=1).mT if x.dim() == 4 else x for x in inputs]
    rows = torch.cat([row.reshape(-1, layer.weight[0].numel()) for row in rows])
    mean, moment = rows.mean(dim=0), rows.T @ rows / len(rows)
    if layer.bias is not None:
        moment -= torch.outer(mean, mean)
    weight = layer.weight.flatten(1)
    codes, scale = quantize_rows_for_inputs(weight, [factorize(moment)], 2)
    changed = {"weight": (codes * scale[:, None]).view_as(layer.weight)}
    if layer.bias is not None:
        changed["bias"] = layer.bias + (weight - codes * scale[:, None]) @ mean
    with temporary_weight(layer, **changed):
        found = sample_errors(study.model, second)
    for each in study.layers.values():
        each.weight.data = rounded(each.weight, 2)
    expected = np.mean(found / sample_errors(study.model, second))
    assert estimates["calibrated"].records[name, 2]["calibrated_error"] == pytest.approx(expected, rel=0.02)


def test_calibrated_layers_change_the_prediction_less_than_rounded_ones(estimates, study):
    calls, alone = study.reference.calls[1::2], []
    nearest = {name: rounded(layer.weight, 2) for name, layer in study.layers.items()}
    for name, layer in study.layers.items():
        with temporary_weight(layer, nearest[name]):
            alone.append(sample_errors(study.model, calls))
    for name, layer in study.layers.items():
        layer.weight.data = nearest[name]
    usual = sample_errors(study.model, calls)
    calibrated = estimates["calibrated"].sensitivity(2)
    assert sum(calibrated.values()) < 0.7 * sum(np.mean(errors / usual) for errors in alone)


def test_calibrating_needs_a_call_beside_the_one_that_is_measured(study):
    study.reference.calls[1:] = []
    with pytest.raises(ValueError, match="needs two calls: raise calls"):
        next(module.measure_calibrated(study, [(LINEAR, 2)]))


def test_gradient_error_is_the_first_order_change_of_the_prediction(study, monkeypatch):
    """||J d||^2 by forward differentiation, which needs no random directions."""
    monkeypatch.setattr(module, "PROBES", 100)
    names = [LINEAR, STRIDED]
    found = {
        item: metrics["gradient_error"] for item, metrics in module.measure_gradient(study, [(n, 1) for n in names])
    }
    for name in names:
        layer = study.layers[name]
        weight, change = layer.weight.detach(), rounded(layer.weight, 1) - layer.weight
        expected = 0.0
        for call in study.reference.calls:
            with torch.no_grad():
                layer.weight.data = weight + 0.01 * change
                ahead = call.repeat(study.model)
                layer.weight.data = weight - 0.01 * change
                expected += ((ahead - call.repeat(study.model)) / 0.02).square().mean().item()
        layer.weight.data = weight
        # 400 directions: a relative deviation of 7 %.
        assert found[name, 1] == pytest.approx(expected / len(study.reference.calls), rel=0.25)
    assert not any(parameter.requires_grad for parameter in study.model.parameters())
    assert all(parameter.grad is None for parameter in study.model.parameters())


@pytest.mark.parametrize("method", ["prediction", "gradient"])
def test_estimates_of_the_prediction_rank_layers_as_the_full_analysis_does(full, estimates, method):
    assert rank_correlations(full, estimates[method])["all"] > 0.8


@pytest.mark.parametrize("method", ["calibrated", "prediction", "gradient", "output", "weight"])
def test_a_layer_that_gives_nothing_has_no_sensitivity(estimates, method):
    assert all(estimates[method].sensitivity(bits)[DEAD] == 0 for bits in (1, 2, 3))


def test_estimates_have_the_file_of_the_full_analysis(full, estimates, tmp_path):
    for name, analysis in estimates.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(analysis.to_text())
        loaded = Analysis.load(path)
        assert loaded == analysis
        assert loaded.header.method == name and loaded.header.run != full.header.run
        assert loaded.header.layers == full.header.layers and loaded.header.items == full.header.items


@pytest.fixture
def transformer_study() -> Study:
    """A transformer whose last block ends in a layer that nothing reads."""
    model = tiny_sd3().requires_grad_(False)
    model.transformer_blocks[-1].unread = nn.Linear(4, 4).requires_grad_(False)
    arguments = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([500, 900]),
        "return_dict": False,
    }
    with torch.no_grad():
        call = Call((), arguments, model(**arguments)[0])
    reference = Reference(np.empty((0, 0, 0, 3), np.uint8), [call, call])
    return Study(SimpleNamespace(transformer=model), [], SETTINGS, None, reference)


def test_transformers_and_layers_that_are_never_called(transformer_study, monkeypatch):
    monkeypatch.setattr(module, "PROBES", 40)
    items = [(name, 2) for name in transformer_study.layers]
    unread, rest = "transformer_blocks.1.unread", "transformer_blocks.0.attn.to_v"
    sensitivity = {}
    for measure in (
        module.measure_output,
        module.measure_gradient,
        module.measure_prediction,
        module.measure_calibrated,
    ):
        records = dict(measure(transformer_study, items))
        assert list(records) == items
        sensitivity[measure] = {name: next(iter(metrics.values())) for (name, _), metrics in records.items()}
        assert sensitivity[measure][unread] == 0 < sensitivity[measure][rest]
    ranks = rankdata(
        [list(sensitivity[m].values()) for m in (module.measure_gradient, module.measure_prediction)], axis=1
    )
    assert np.corrcoef(ranks)[0, 1] > 0.8

    calls = transformer_study.reference.calls
    trained = trained_weight(transformer_study.model, rest, 1, calls, steps=3, learning_rate=4e-3)
    assert trained.shape == transformer_study.layers[rest].weight.shape


def test_fewer_calls_than_asked_for_are_all_of_them(small_pipe):
    recorded = record(small_pipe, small_pipe.unet, CAPTIONS, SETTINGS.sampling, 100, progress=False)
    # Two batches of three calls each: two steps of PNDM take three.
    assert len(recorded.calls) == 6
    assert [len(call.output) for call in recorded.calls] == [4, 4, 4, 2, 2, 2]
    with torch.no_grad():
        assert all(torch.equal(call.repeat(small_pipe.unet), call.output) for call in recorded.calls)
