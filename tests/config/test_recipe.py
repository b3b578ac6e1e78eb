import json
import math
from collections import Counter

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from helpers import layer_sizes
from tiny import tiny_unet
from torch import nn

from diffusers_bitsfusion import BitsFusionConfig, Recipe, quantize_model

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED = "stable-diffusion-v1-5"


@pytest.fixture(scope="module")
def sd15():
    with init_empty_weights():
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


@pytest.fixture(scope="module")
def published():
    return Recipe.load(PUBLISHED)


def test_the_published_recipe_has_the_papers_histogram(published):
    assert len(published) == 256
    assert published.histogram() == {1: 66, 2: 59, 3: 67, 4: 45, 5: 9, 6: 7, 7: 3}


def test_the_published_recipe_names_layers_of_sd15_with_their_shapes(published, sd15):
    modules = dict(sd15.named_modules())
    assert set(published.shapes) == set(published)
    for name in published:
        assert isinstance(modules[name], (nn.Linear, nn.Conv2d))
        assert published.shapes[name] == tuple(modules[name].weight.shape)


def test_the_published_recipe_covers_all_but_the_first_the_last_and_the_time_path(published, sd15):
    left = set(layer_sizes(sd15)) - set(published)
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"} <= left
    assert sum(name.endswith(".time_emb_proj") for name in left) == len(left) - 4 == 22


@pytest.mark.parametrize(("bits", "share"), [(1, 60.5), (2, 25.8), (3, 9.7), (4, 3.6)])
def test_the_published_shares_of_the_weights(published, sd15, bits, share):
    weights = layer_sizes(sd15)
    total = sum(weights[name] for name in published)
    assert 100 * sum(weights[n] for n in published if published[n] == bits) / total == pytest.approx(share, abs=0.05)


def test_the_published_average_in_both_conventions(published, sd15):
    average = published.average_bits(sd15)
    assert average.paper == pytest.approx(1.988, abs=5e-4)
    assert average.layers == pytest.approx(2.0355, abs=5e-5)


def test_the_average_is_the_papers_formula(published, sd15):
    weights = layer_sizes(sd15)
    bits = sum(math.log2(2 ** published[name] + 1) * weights[name] for name in published)
    in_out = 8 * (weights["conv_in"] + weights["conv_out"])
    features = 16 * 50 * 20_160
    average = published.average_bits(sd15)
    assert average.paper == pytest.approx((bits + in_out + features) / sum(weights.values()), rel=1e-12)
    assert average.layers == pytest.approx(bits / sum(weights[name] for name in published), rel=1e-12)


def test_layers_outside_the_recipe_count_as_16_bits():
    model = tiny_unet()
    weights = layer_sizes(model)
    name = "mid_block.resnets.0.conv1"
    time = [n for n in weights if "time_emb" in n]
    features = sum(m.out_features for n, m in model.named_modules() if n.endswith("time_emb_proj"))
    bits = sum(16 * count for n, count in weights.items() if n not in (name, "conv_in", "conv_out", *time))
    bits += 8 * (weights["conv_in"] + weights["conv_out"]) + math.log2(5) * weights[name] + 16 * 50 * features
    average = Recipe({name: 2}).average_bits(model)
    assert average.paper == pytest.approx(bits / sum(weights.values()), rel=1e-12)
    assert average.layers == pytest.approx(math.log2(5))


def test_the_average_over_a_model_that_lacks_a_layer_is_refused():
    with pytest.raises(ValueError, match="lacks: no.such.layer"):
        Recipe({"no.such.layer": 2}).average_bits(tiny_unet())


def test_a_recipe_is_a_read_only_mapping():
    recipe = Recipe({"a": 1, "b.c": 8})
    assert len(recipe) == 2
    assert list(recipe) == ["a", "b.c"]
    assert recipe["b.c"] == 8 and recipe.get("x") is None and "a" in recipe
    assert dict(recipe) == {"a": 1, "b.c": 8} == recipe
    assert recipe.histogram() == Counter({1: 1, 8: 1})
    with pytest.raises(TypeError):
        recipe["a"] = 2
    with pytest.raises(KeyError):
        recipe["x"]


def test_a_recipe_does_not_follow_later_changes_of_its_source():
    layers = {"a": 1}
    recipe = Recipe(layers)
    layers["a"] = 5
    assert recipe["a"] == 1


def test_the_representation_counts_layers_by_bits():
    assert repr(Recipe({"a": 1, "b": 3, "c": 1})) == "Recipe(3 layers: 2 of 1 bit, 1 of 3 bit)"


@pytest.mark.parametrize("bits", [0, 9, 17, -1, 2.0, "2", None, True])
def test_impossible_bits_are_refused_naming_the_layer(bits):
    with pytest.raises(ValueError, match=r"bits of layer 'b\.c' must be an integer from 1 to 8"):
        Recipe({"a": 1, "b.c": bits})


@pytest.mark.parametrize(
    ("shapes", "fits"),
    [
        ({"a": (4, 3), "b": (2, 2)}, True),
        ({"a": [4, 3], "b": (9, 9), "more": (1,)}, True),
        ({"a": (4, 4), "b": (2, 2)}, False),
        ({"a": (4, 3)}, False),
        ({}, False),
    ],
)
def test_a_recipe_fits_where_every_layer_and_known_shape_is(shapes, fits):
    assert Recipe({"a": 1, "b": 2}, shapes={"a": (4, 3)}).fits(shapes) is fits


def test_what_is_saved_is_loaded_again(tmp_path):
    recipe = Recipe({"a": 1, "b.ü": 7}, source="a test", shapes={"a": (4, 3)})
    recipe.save(tmp_path / "my.json")
    for path in (tmp_path / "my.json", str(tmp_path / "my.json")):
        loaded = Recipe.load(path)
        assert loaded == recipe
        assert (loaded.source, loaded.shapes) == ("a test", {"a": (4, 3)})


def test_a_folder_holds_its_recipe_as_recipe_json(tmp_path):
    Recipe({"a": 3}).save(tmp_path)
    assert json.loads((tmp_path / "recipe.json").read_text()) == {"layers": {"a": 3}}
    assert Recipe.load(tmp_path) == {"a": 3}


def test_the_published_recipe_survives_saving(tmp_path, published):
    published.save(tmp_path)
    loaded = Recipe.load(tmp_path)
    assert loaded == published and loaded.shapes == published.shapes


@pytest.mark.parametrize("name", ["nothing", "no/such/file.json", "user/name.json", ""])
def test_what_does_not_exist_is_refused_naming_what_does(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=PUBLISHED):
        Recipe.load(name)


def test_a_folder_without_a_recipe_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a shipped name"):
        Recipe.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"layers": {"a": 1}',
        b"[1, 2]",
        b'"text"',
        b"{}",
        b'{"layers": [1]}',
        b'{"layers": {"a": 1}, "shapes": [1]}',
        b'{"layers": {"a": 1}, "shapes": {"a": 3}}',
        b"\x80\x81\xff not text",
    ],
)
def test_a_file_that_is_no_recipe_is_refused_naming_it(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.json"):
        Recipe.load(path)


@pytest.mark.parametrize("bits", ["0", "17", "1.5", '"3"', "null"])
def test_a_file_with_impossible_bits_is_refused_naming_the_layer(tmp_path, bits):
    path = tmp_path / "r.json"
    path.write_text(f'{{"layers": {{"good": 2, "bad.layer": {bits}}}}}')
    with pytest.raises(ValueError, match="bad.layer"):
        Recipe.load(path)


def test_a_recipe_from_the_hub_is_downloaded_by_its_id(tmp_path, monkeypatch):
    Recipe({"a": 4}).save(tmp_path)
    asked = []

    def download(repo, name, token):
        asked.append((repo, name, token))
        return str(tmp_path / name)

    monkeypatch.setattr("diffusers_bitsfusion.config.recipe.hf_hub_download", download)
    assert Recipe.load("someone/something", token="secret") == {"a": 4}
    assert asked == [("someone/something", "recipe.json", "secret")]


def test_average_bits_of_a_model_without_a_plain_time_embedding_counts_it_as_16_bits():
    model = tiny_unet(class_embed_type="timestep")
    weights = layer_sizes(model)
    bits = 8 * (weights["conv_in"] + weights["conv_out"])
    bits += 16 * sum(count for name, count in weights.items() if name not in ("conv_in", "conv_out", "mid"))
    bits -= 16 * weights["mid_block.resnets.0.conv1"] - math.log2(3) * weights["mid_block.resnets.0.conv1"]
    average = Recipe({"mid_block.resnets.0.conv1": 1}).average_bits(model)
    assert average.paper == pytest.approx(bits / sum(weights.values()), rel=1e-12)


def test_the_average_needs_no_weights_in_memory(published, sd15):
    assert published.average_bits(sd15).paper < 2
    assert all(p.device == torch.device("meta") for p in sd15.parameters())


@pytest.mark.parametrize("time_embedding", ["keep", "table", "cache"])
def test_a_quantized_model_has_the_averages_of_the_original(time_embedding, tmp_path):
    unet = tiny_unet()
    config = BitsFusionConfig(recipe=2, time_embedding=time_embedding)
    quantized = quantize_model(tiny_unet(), config, progress=False)
    special = ("conv_in", "conv_out", "time_emb")
    names = [name for name, layer in unet.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    recipe = Recipe({name: 1 + i % 4 for i, name in enumerate(names) if not any(part in name for part in special)})
    assert recipe.average_bits(quantized) == recipe.average_bits(unet)
    quantized.save_pretrained(tmp_path)
    quantized.register_to_config(sample_size=8)  # diffusers then keeps the quantization config as a plain dict
    assert recipe.average_bits(quantized) == recipe.average_bits(unet)
