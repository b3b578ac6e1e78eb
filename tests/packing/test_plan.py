import logging
import math

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLMiniMaxH3Audio, MiniMaxMusic3Vocoder, PixArtTransformer2DModel, UNet2DConditionModel
from helpers import layer_sizes
from tiny import tiny_controlnet, tiny_unet

from diffusers_bitsfusion import BitsFusionConfig, Recipe, quantize_model
from diffusers_bitsfusion.allocation.average_bits import average_bits, is_in_out
from diffusers_bitsfusion.packing.planning import make_plan, matches

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED = Recipe.load("stable-diffusion-v1-5")
SPECIAL = ("conv_in", "conv_out")


@pytest.fixture(scope="module")
def sd15():
    with init_empty_weights():
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


def pixart():
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
        norm_num_groups=1,
    )


def is_time(name):
    return "time_embedding" in name or "time_emb_proj" in name


def ordinary_layers(model):
    return [name for name in layer_sizes(model) if name not in SPECIAL and not is_time(name)]


def paper_average(model, plan):
    """The paper's formula on a plan that replaces the time embedding and packs all else."""
    weights = layer_sizes(model)
    bits = sum((8 if n == 8 else math.log2(2**n + 1)) * weights[name] for name, n in plan.bits.items())
    features = sum(m.out_features for n, m in model.named_modules() if n.endswith("time_emb_proj"))
    cached = 0 if plan.time_embedding == "keep" else 16 * 50 * features
    return (bits + cached) / sum(weights.values())


def test_sd15_gets_the_published_recipe(sd15):
    plan = make_plan(sd15, BitsFusionConfig())
    assert plan.bits == dict(PUBLISHED) | {"conv_in": 8, "conv_out": 8}
    assert plan.time_embedding == "table" and plan.num_timesteps == 1000
    assert paper_average(sd15, plan) == pytest.approx(1.988, abs=5e-4)


def test_the_layers_of_a_plan_are_in_the_models_order(sd15):
    order = [name for name in layer_sizes(sd15) if not is_time(name)]
    assert list(make_plan(sd15, BitsFusionConfig()).bits) == order


@pytest.mark.parametrize("target", [1.7, 2.5, 4.0])
def test_another_target_on_sd15_is_met_by_data_free_allocation(sd15, target):
    plan = make_plan(sd15, BitsFusionConfig(target_bits=target))
    assert {name: plan.bits[name] for name in PUBLISHED} != dict(PUBLISHED)
    assert target - 0.01 < paper_average(sd15, plan) <= target


@pytest.mark.parametrize(
    "changes",
    [{"cross_attention_dim": 1024}, {"layers_per_block": 1}, {"use_linear_projection": True}],
    ids=str,
)
def test_a_unet_of_another_shape_is_allocated_data_free(changes):
    with init_empty_weights():
        model = UNet2DConditionModel(**({"sample_size": 64, "cross_attention_dim": 768} | changes))
    plan = make_plan(model, BitsFusionConfig())
    assert set(plan.bits) == {name for name in layer_sizes(model) if not is_time(name)}
    assert 1.98 < paper_average(model, plan) <= 1.99


def test_sd15_with_more_input_channels_still_gets_the_published_recipe():
    with init_empty_weights():
        model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, in_channels=9)
    plan = make_plan(model, BitsFusionConfig())
    assert {name: plan.bits[name] for name in PUBLISHED} == dict(PUBLISHED)


@pytest.mark.parametrize("make", [tiny_unet, tiny_controlnet, pixart])
@pytest.mark.parametrize("target", [2.6, 4.0])
def test_other_models_meet_the_target(make, target):
    model = make()
    plan = make_plan(model, BitsFusionConfig(target_bits=target, in_out_bits=2))
    assert set(plan.bits) == {n for n in layer_sizes(model) if plan.time_embedding == "keep" or not is_time(n)}
    average = paper_average(model, plan)
    assert average <= target
    smallest = min(layer_sizes(model)[name] for name in plan.bits)
    assert average > target - max(0.05, 2 * smallest / sum(layer_sizes(model).values()))


@pytest.mark.parametrize("target", [0.1, 1.0, 7.9, 16])
@pytest.mark.parametrize("make", [tiny_unet, pixart])
def test_a_target_out_of_reach_is_refused_by_name(make, target):
    with pytest.raises(ValueError, match=f"target_bits={target} cannot be reached for this model: .* layers"):
        make_plan(make(), BitsFusionConfig(target_bits=target))


def test_uniform_bits_apply_to_all_but_first_last_and_time(unet):
    plan = make_plan(unet, BitsFusionConfig(recipe=3, in_out_bits=6, time_embedding="keep"))
    for name, bits in plan.bits.items():
        assert bits == (6 if name in SPECIAL or is_time(name) else 3), name
    assert set(plan.bits) == set(layer_sizes(unet))


@pytest.mark.parametrize("form", ["mapping", "Recipe", "path"])
def test_a_recipe_of_ones_own_is_taken_as_it_is(unet, tmp_path, form):
    own = {name: 1 + i % 7 for i, name in enumerate(ordinary_layers(unet))}
    Recipe(own).save(tmp_path / "own.json")
    recipe = {"mapping": own, "Recipe": Recipe(own), "path": tmp_path / "own.json"}[form]
    plan = make_plan(unet, BitsFusionConfig(recipe=recipe))
    assert {name: plan.bits[name] for name in own} == own
    assert all(plan.bits[name] == 8 for name in SPECIAL)


def test_a_recipe_may_name_the_first_and_last_layer_too(unet):
    own = dict.fromkeys(ordinary_layers(unet), 2) | {"conv_in": 5, "conv_out": 4}
    plan = make_plan(unet, BitsFusionConfig(recipe=own))
    assert (plan.bits["conv_in"], plan.bits["conv_out"]) == (5, 4)


def test_a_recipe_that_names_a_time_layer_matters_only_where_the_time_embedding_stays(unet):
    own = dict.fromkeys(ordinary_layers(unet), 2) | {"time_embedding.linear_1": 5}
    kept = make_plan(unet, BitsFusionConfig(recipe=own, time_embedding="keep"))
    assert kept.bits["time_embedding.linear_1"] == 5 and kept.bits["time_embedding.linear_2"] == 8
    assert "time_embedding.linear_1" not in make_plan(unet, BitsFusionConfig(recipe=own, time_embedding="table")).bits


@pytest.mark.parametrize("name", ["no.such.layer", "conv_norm_out", "down_blocks.0"])
def test_a_recipe_naming_what_is_no_layer_of_the_model_is_refused(unet, name):
    own = dict.fromkeys(ordinary_layers(unet), 2) | {name: 2}
    with pytest.raises(ValueError, match=f"names layers that the model lacks: {name}"):
        make_plan(unet, BitsFusionConfig(recipe=own))


def test_many_unknown_layers_are_counted(unet):
    own = dict.fromkeys(ordinary_layers(unet), 2) | {f"x{i}": 1 for i in range(9)}
    with pytest.raises(ValueError, match=r"x0, x1, x2, x3, x4 and 4 more"):
        make_plan(unet, BitsFusionConfig(recipe=own))


def test_a_recipe_that_misses_layers_is_refused_naming_them(unet):
    own = dict.fromkeys(ordinary_layers(unet), 2)
    missing = list(own)[3]
    del own[missing]
    with pytest.raises(ValueError, match=f"misses layers that the model has .*modules_to_not_convert.*: {missing}"):
        make_plan(unet, BitsFusionConfig(recipe=own))
    plan = make_plan(unet, BitsFusionConfig(recipe=own, modules_to_not_convert=[missing]))
    assert missing not in plan.bits


def test_a_recipe_for_layers_of_another_shape_is_refused(unet, tmp_path):
    own = dict.fromkeys(ordinary_layers(unet), 2)
    name = next(iter(own))
    Recipe(own, shapes={name: (1, 1)}).save(tmp_path)
    with pytest.raises(ValueError, match=f"is for layers of another shape: {name}"):
        make_plan(unet, BitsFusionConfig(recipe=str(tmp_path)))


def test_the_shapes_of_a_recipe_given_as_an_object_are_checked_too(unet):
    own = dict.fromkeys(ordinary_layers(unet), 2)
    name = next(iter(own))
    with pytest.raises(ValueError, match=f"is for layers of another shape: {name}"):
        make_plan(unet, BitsFusionConfig(recipe=Recipe(own, shapes={name: (1, 1)})))


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("down.0.attn2.to_k", "attn2", True),
        ("down.0.attn2.to_k", "attn2.to_k", True),
        ("down.0.attn2.to_k", "down.0.attn2.to_k", True),
        ("down.0.attn2.to_k", "attn", False),
        ("down.0.attn2.to_k", "to", False),
        ("down.0.attn2.to_k", "down.0.attn2.to_k.x", False),
        ("down.10.x", "down.1", False),
    ],
)
def test_a_module_matches_by_whole_parts_of_its_name(name, pattern, expected):
    assert matches(name, [pattern]) is expected


def test_modules_to_not_convert_stay_and_the_rest_keeps_the_published_bits(sd15):
    plan = make_plan(sd15, BitsFusionConfig(modules_to_not_convert=["attn2.to_k", "mid_block.attentions", "conv_out"]))
    left = [n for n in PUBLISHED if "attn2.to_k" in n or n.startswith("mid_block.attentions.")]
    assert len(left) > 20
    assert plan.bits == {n: PUBLISHED[n] for n in PUBLISHED if n not in left} | {"conv_in": 8}


def test_a_time_layer_among_modules_to_not_convert_keeps_the_time_embedding(sd15, caplog):
    config = BitsFusionConfig(modules_to_not_convert=["time_embedding"], time_embedding="table")
    with caplog.at_level(logging.WARNING, logger="diffusers_bitsfusion"):
        plan = make_plan(sd15, config)
    assert plan.time_embedding == "keep"
    assert not [name for name in plan.bits if name.startswith("time_embedding.")]
    assert [name for name in plan.bits if name.endswith("time_emb_proj")]
    assert "modules_to_not_convert names a part of it" in caplog.text


def test_excluded_modules_are_planned_like_modules_to_not_convert(unet):
    config = BitsFusionConfig(target_bits=3.0, time_embedding="keep")
    named = BitsFusionConfig(target_bits=3.0, time_embedding="keep", modules_to_not_convert=["mid_block"])
    excluded = make_plan(unet, config, exclude=["mid_block"])
    assert not [name for name in excluded.bits if name.startswith("mid_block.")]
    assert excluded.bits == make_plan(unet, named).bits


@pytest.mark.parametrize("options", [{"recipe": 2}, {"recipe": {}}], ids=str)
def test_a_model_of_which_only_first_and_last_layers_are_left_is_planned(unet, options):
    blocks = ["down_blocks", "mid_block", "up_blocks", "time_embedding"]
    plan = make_plan(unet, BitsFusionConfig(modules_to_not_convert=blocks, **options))
    assert plan.bits == {"conv_in": 8, "conv_out": 8}


def test_a_target_that_the_first_and_last_layer_alone_miss_is_refused(unet):
    blocks = ["down_blocks", "mid_block", "up_blocks", "time_embedding"]
    with pytest.raises(ValueError, match=r"target_bits=3.0 cannot be reached"):
        make_plan(unet, BitsFusionConfig(modules_to_not_convert=blocks, target_bits=3.0))


def test_a_model_of_which_nothing_is_left_is_refused(unet):
    blocks = ["down_blocks", "mid_block", "up_blocks", "time_embedding", "conv_in", "conv_out"]
    with pytest.raises(ValueError, match="UNet2DConditionModel has no layer to quantize"):
        make_plan(unet, BitsFusionConfig(modules_to_not_convert=blocks))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_model_that_keeps_all_of_itself_in_fp32_is_refused_naming_it():
    with torch.device("meta"):
        model = AutoencoderKLMiniMaxH3Audio()
    config = BitsFusionConfig(recipe=2)
    with pytest.raises(ValueError, match=r"H3Audio has no layer to quantize beside encoder, decoder,.*, which stay"):
        make_plan(model, config, model._keep_in_fp32_modules)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_first_and_last_layers_of_other_kinds_get_the_bits_of_such_layers_and_count_as_such():
    with torch.device("meta"):
        model = MiniMaxMusic3Vocoder(8, 8, 8, (2,))  # its first and last layers are of one dimension, normalised
    plan = make_plan(model, BitsFusionConfig(recipe=2, in_out_bits=8))
    ends = {name for name, bits in plan.bits.items() if bits == 8}
    assert ends == {"conv_in.packed_weight_v", "conv_out.packed_weight_v"}
    assert is_in_out("conv_in.parametrizations.weight.packed_original1")
    sizes = {name: (bits, plan.tensors[name].num_weights) for name, bits in plan.bits.items()}
    assert average_bits(sizes).layers == pytest.approx(math.log2(5))  # levels of a balanced grid of two bits


def test_a_quantized_model_is_refused():
    model = quantize_model(tiny_unet(), BitsFusionConfig(recipe=2), progress=False)
    with pytest.raises(ValueError, match=r"UNet2DConditionModel is quantized already.*dequantize"):
        make_plan(model, BitsFusionConfig())


@pytest.mark.parametrize("kind", ["table", "cache", "keep"])
def test_the_time_embedding_asked_for_is_planned(unet, kind):
    assert make_plan(unet, BitsFusionConfig(recipe=2, time_embedding=kind)).time_embedding == kind


def test_auto_keeps_a_time_embedding_smaller_than_a_table(unet, sd15):
    assert make_plan(unet, BitsFusionConfig(recipe=2)).time_embedding == "keep"
    assert make_plan(sd15, BitsFusionConfig()).time_embedding == "table"


def test_the_cache_holds_the_papers_50_steps_or_those_asked_for(unet):
    plan = make_plan(unet, BitsFusionConfig(recipe=2, time_embedding="cache"))
    assert plan.timesteps == [1 + 20 * i for i in range(50)]
    own = {"type": "cache", "timesteps": [3, 1.5]}
    assert make_plan(unet, BitsFusionConfig(recipe=2, time_embedding=own)).timesteps == [3, 1.5]


@pytest.mark.parametrize("kind", ["table", "cache"])
def test_a_model_that_cannot_be_cached_keeps_its_time_embedding_and_says_so(kind, caplog):
    model = tiny_unet(class_embed_type="timestep")
    with caplog.at_level(logging.WARNING, logger="diffusers_bitsfusion"):
        plan = make_plan(model, BitsFusionConfig(recipe=2, time_embedding=kind))
    assert plan.time_embedding == "keep"
    assert f'kept, not replaced by a "{kind}"' in caplog.text and "class_embedding" in caplog.text
    assert plan.bits["time_embedding.linear_1"] == 8


def test_auto_says_nothing_about_a_time_embedding_it_keeps(caplog):
    with caplog.at_level(logging.WARNING, logger="diffusers_bitsfusion"):
        make_plan(tiny_unet(class_embed_type="timestep"), BitsFusionConfig(recipe=2))
    assert caplog.text == ""
