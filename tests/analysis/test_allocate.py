"""From an analysis to a recipe: targets, budgets in real bytes, and what is out of reach."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from diffusers_bitsfusion import BitsFusionConfig, Recipe, quantize_model, size_report
from diffusers_bitsfusion.analysis.allocate import RULES, Totals, allocate, predicted_sensitivity

from .conftest import DEAD

LAYER_BITS = 2.2


@pytest.mark.parametrize("rule", RULES)
def test_a_recipe_of_any_rule_reaches_its_target_and_quantizes_the_model(full, small_pipe, target_of, rule):
    recipe = allocate(full, target_of(LAYER_BITS), rule=rule)
    assert list(recipe) == list(full.header.layers) and recipe.shapes == full.shapes
    totals = Totals.of(recipe, full)
    assert totals.layer_bits == pytest.approx(recipe.average_bits(small_pipe.unet).layers)
    if rule != "knapsack":  # which spends bytes
        assert LAYER_BITS - 0.3 < totals.layer_bits <= LAYER_BITS
    quantize_model(small_pipe.unet, BitsFusionConfig(recipe=recipe), progress=False)
    assert all(small_pipe.unet.get_submodule(name).bits == n for name, n in recipe.items())
    assert totals.paper_bits == pytest.approx(size_report(small_pipe.unet).average_bits.paper)


def test_bytes_are_those_of_the_file(full, small_pipe, target_of, tmp_path):
    recipe = allocate(full, target_of(LAYER_BITS))
    quantize_model(small_pipe.unet, BitsFusionConfig(recipe=recipe), progress=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    found = sum(tensors[f"{name}.{part}"].nbytes for name in recipe for part in ("codes", "scale"))
    assert Totals.of(recipe, full).bytes == found


def test_the_knapsack_needs_no_more_bytes_than_the_data_free_recipe_and_has_the_lowest_sensitivity(full, target_of):
    target = target_of(LAYER_BITS)
    totals = {rule: Totals.of(allocate(full, target, rule=rule), full) for rule in RULES}
    assert totals["knapsack"].bytes <= totals["data-free"].bytes
    assert totals["knapsack"].sensitivity <= totals["data-free"].sensitivity
    within = totals["paper"].bytes
    other = Totals.of(allocate(full, max_bytes=within), full)
    assert other.bytes <= within and other.sensitivity <= totals["paper"].sensitivity


@pytest.mark.parametrize("rule", RULES)
def test_a_budget_in_bytes_is_kept_and_nearly_spent(full, rule):
    budget = Totals.of(dict.fromkeys(full.header.layers, 2), full).bytes
    spent = Totals.of(allocate(full, max_bytes=budget, rule=rule), full).bytes
    assert 0.95 * budget < spent <= budget


@pytest.mark.parametrize("rule", RULES[:2])
def test_a_layer_that_never_changes_the_output_gets_the_fewest_bits(full, target_of, rule):
    for layer_bits in (1.9, 2.5, 3.5):
        assert allocate(full, target_of(layer_bits), rule=rule)[DEAD] == 1


def test_the_data_free_rule_is_that_of_the_config(full, small_pipe, target_of):
    config = BitsFusionConfig(target_bits=target_of(LAYER_BITS))
    quantize_model(small_pipe.unet, config, progress=False)
    recipe = allocate(full, target_of(LAYER_BITS), rule="data-free")
    assert recipe == {name: small_pipe.unet.get_submodule(name).bits for name in recipe}


def test_the_papers_rule_without_clip_scores_goes_by_the_threshold_alone(make_analysis):
    layers = {f"layer{i}": (1000, (0.1 * i, 0.05 * i, 0.02 * i)) for i in range(1, 30)}
    plain = make_analysis(layers)
    drops = {name: float(name == "layer1") for name in layers}
    assert allocate(plain, 2.0, rule="paper")["layer1"] == 1
    assert allocate(make_analysis(layers, drops), 2.0, rule="paper")["layer1"] == 4


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("target", [1.2, 7.5])
def test_a_target_that_no_assignment_reaches_is_refused(full, rule, target):
    with pytest.raises(
        ValueError,
        match=rf"target_bits={target}, of which .* take \d\.\d+, cannot be reached for this model: .*a weight",
    ):
        allocate(full, target, rule=rule)


@pytest.mark.parametrize("rule", RULES)
def test_too_few_bytes_are_refused(full, rule):
    with pytest.raises(ValueError, match="max_bytes=10 cannot be reached"):
        allocate(full, max_bytes=10, rule=rule)


def test_an_unknown_rule_is_refused(full):
    with pytest.raises(ValueError, match="rule must be one of knapsack, paper, data-free; got 'best'"):
        allocate(full, rule="best")


def test_a_recipe_is_saved_loaded_and_used_on_a_fine_tune(full, small_folder, target_of, tmp_path):
    allocate(full, target_of(LAYER_BITS)).save(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(small_folder)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    recipe = Recipe.load(tmp_path)
    quantize_model(pipe, BitsFusionConfig(recipe=str(tmp_path)), progress=False)
    assert {name: pipe.unet.get_submodule(name).bits for name in recipe} == recipe


def test_above_the_measured_bits_sensitivity_falls_as_the_weight_error_does(make_analysis):
    analysis = make_analysis({"a": (1000, (0.4, 0.2, 0.05)), "dead": (10, (0.0, 0.0, 0.0))})
    predicted, errors = predicted_sensitivity(analysis), analysis.header.layers["a"].weight_error
    assert predicted["a"][:3] == [0.4, 0.2, 0.05]
    assert predicted["a"][3:] == pytest.approx([0.05 * error / errors[2] for error in errors[3:]])
    assert predicted["dead"] == [0.0] * 7
