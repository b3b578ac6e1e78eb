import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.resnet import ResnetBlock2D
from tiny import tiny_controlnet, tiny_unet
from torch import nn

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.codec.time_schema import TimeFeaturesSchema
from diffusers_bitsfusion.codec.time_table import packed_rows, quantize_table
from diffusers_bitsfusion.nn.time_features import TimeFeatureCache, TimeFeatures, TimeFeatureTable
from diffusers_bitsfusion.nn.time_path import TimePath, empty_lookup, install, why_not_cacheable
from diffusers_bitsfusion.nn.time_restoration import restore

pytestmark = pytest.mark.usefixtures("one_thread")

TIMESTEPS = [1.0, 21.0, 500.5, 999.0]


def exact_features(model, timesteps):
    """All blocks' features side by side, computed by the model's own modules."""
    blocks = [module for module in model.modules() if isinstance(module, ResnetBlock2D)]
    with torch.no_grad():
        embedded = model.time_embedding(model.time_proj(timesteps))
        return torch.cat([block.time_emb_proj(F.silu(embedded)) for block in blocks], dim=1)


def with_cache(model, timesteps):
    path = TimePath.find(model)
    cache = TimeFeatureCache([float(t) for t in timesteps], sum(size for _, size in path.sizes))
    cache.set_features(torch.cat(list(path.compute(torch.tensor(timesteps))[1]), dim=1))
    install(model, cache, path.sizes, model.dtype)
    return model


def with_table(model, num_timesteps=1000):
    path = TimePath.find(model)
    table = TimeFeatureTable(num_timesteps, sum(size for _, size in path.sizes), path.embedding_width)
    embedding, features = path.compute(table.rows)
    table.set_codes(*quantize_table(torch.cat(list(features), dim=1)))
    table.set_embedding(*quantize_table(embedding))
    install(model, table, path.sizes, model.dtype)
    return model


def call(model, timestep):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float32).to(model.dtype)
    text = torch.randn(2, 7, 32, generator=generator).to(model.dtype)
    with torch.no_grad():
        if isinstance(model, UNet2DConditionModel):
            return model(image, timestep, encoder_hidden_states=text).sample
        cond = torch.randn(2, 3, 16, 16, generator=generator).to(model.dtype)
        return model(image, timestep, text, cond, return_dict=False)[1]


def relative(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def controlnet():
    """A ControlNet whose output, zero after initialisation, depends on everything before it."""
    model = tiny_controlnet()
    nn.init.normal_(model.controlnet_mid_block.weight)
    return model


MODELS = {
    "unet": tiny_unet,
    "scale and shift": lambda: tiny_unet(resnet_time_scale_shift="scale_shift"),
    "sine first": lambda: tiny_unet(flip_sin_to_cos=False, freq_shift=1),
    "controlnet": controlnet,
}

every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@every_model
def test_the_features_are_those_of_the_models_own_modules(make):
    model = make()
    timesteps = torch.tensor(TIMESTEPS)
    path = TimePath.find(model)
    parts = list(path.compute(timesteps)[1])
    assert [part.shape[1] for part in parts] == [size for _, size in path.sizes]
    torch.testing.assert_close(torch.cat(parts, dim=1), exact_features(model, timesteps), rtol=1e-5, atol=1e-6)


def test_features_of_a_half_precision_model_are_computed_in_fp32():
    model = tiny_unet()
    rounded = copy.deepcopy(model).half().float()
    (features,) = [torch.cat(list(TimePath.find(model.half()).compute(torch.tensor([999.0]))[1]), dim=1)]
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, exact_features(rounded, torch.tensor([999.0])), rtol=1e-5, atol=1e-6)


@every_model
def test_the_path_names_the_time_layers_and_counts_their_weights(make):
    model = make()
    path = TimePath.find(model)
    expected = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("time_emb_proj" in name or name.startswith("time_embedding."))
    }
    assert set(path.layers) == set(expected)
    assert path.num_weights == sum(module.weight.numel() for module in expected.values())
    assert path.num_parameters == path.num_weights + sum(module.bias.numel() for module in expected.values())


@every_model
@pytest.mark.parametrize("timestep", [21, 500.5, torch.tensor(999), torch.tensor([1, 21])], ids=str)
def test_a_cached_model_equals_the_model_with_its_features_rounded_to_fp16(make, timestep):
    model = make()
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, ResnetBlock2D):
            module.time_emb_proj.register_forward_hook(lambda module, inputs, features: features.half().float())
    with_cache(model, TIMESTEPS)
    assert relative(call(model, timestep), call(plain, timestep)) < 2e-4


def test_a_cached_fp32_model_is_as_exact_as_fp16():
    model = tiny_unet()
    plain = copy.deepcopy(model)
    assert relative(call(with_cache(model, TIMESTEPS), 999), call(plain, 999)) < 1e-3


def test_bf16_models_look_timesteps_up_before_any_cast():
    # bf16 has no 999: a model that cast first would ask for 1000.
    model = tiny_unet().bfloat16()
    plain = copy.deepcopy(model)
    found = call(with_cache(model, [999.0]), 999)
    assert found.dtype == torch.bfloat16
    assert relative(found, call(plain, 999)) < 0.03


@pytest.mark.parametrize("lookup", ["cache", "table"])
def test_the_lookup_leaves_no_layer_of_the_time_path(lookup):
    model = tiny_unet()
    removed = TimePath.find(model).num_parameters
    before = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    with_cache(model, TIMESTEPS) if lookup == "cache" else with_table(model)
    assert before - sum(p.numel() for p in model.parameters() if p.is_floating_point()) == removed
    assert not [name for name, m in model.named_modules() if "time" in name and isinstance(m, nn.Linear)]


def test_a_cached_model_refuses_another_step_naming_the_cached_ones():
    model = with_cache(tiny_unet(), TIMESTEPS)
    with pytest.raises(ValueError, match=r"Timestep 22: .* 1, 21, 500.5, 999 only"):
        call(model, 22)


@every_model
def test_a_model_with_a_table_runs_at_any_step(make):
    model = make()
    plain = copy.deepcopy(model)
    with_table(model)
    for timestep in (0, 1, 500, 998.5, 999, 999.5, 1000):
        assert relative(call(model, timestep), call(plain, timestep)) < 0.01


@pytest.fixture(scope="module")
def wide():
    """(model, model with a table) whose time path is 1280 wide, every weight and bias drawn from N(0, 0.02²)."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(320,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=32,
    )
    assert model.time_embedding.linear_2.out_features == 1280
    for layer in TimePath.find(model).layers.values():
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.normal_(layer.bias, std=0.02)
    return copy.deepcopy(model), with_table(model)


def test_the_table_is_within_half_a_percent_at_every_whole_step(wide):
    plain, tabled = wide
    timesteps = torch.arange(1001)
    expected = exact_features(plain, timesteps)
    found = tabled.time_proj(timesteps)[:, : expected.shape[1]]
    assert relative(found, expected) < 0.005
    by_step = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert by_step.max() < 0.01


def test_the_table_is_within_one_percent_at_half_steps(wide):
    plain, tabled = wide
    timesteps = torch.arange(1000) + 0.5
    expected = exact_features(plain, timesteps)
    assert relative(tabled.time_proj(timesteps)[:, : expected.shape[1]], expected) < 0.01


@pytest.mark.parametrize("offset", [0, 0.5])
def test_the_time_embedding_follows_the_features(wide, offset):
    plain, tabled = wide
    timesteps = torch.arange(1000) + offset
    with torch.no_grad():
        expected = F.silu(plain.time_embedding(plain.time_proj(timesteps)))
    assert relative(tabled.time_proj(timesteps)[:, tabled.time_proj.num_features :], expected) < 0.006


def test_a_wide_table_gives_the_time_embedding_back(wide):
    plain, tabled = wide
    model, timesteps = copy.deepcopy(tabled), torch.arange(1001)
    restore(model, torch.float32)
    with torch.no_grad():
        found, expected = (F.silu(m.time_embedding(m.time_proj(timesteps))) for m in (model, plain))
    assert relative(found, expected) < 0.006


def test_a_wide_table_is_restored_to_a_plain_time_path(wide):
    _, tabled = wide
    model = copy.deepcopy(tabled)
    _, features = model.time_proj.features()
    restore(model, torch.float32)
    assert relative(exact_features(model, torch.arange(1001)), features) < 1e-3


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_restored_cache_is_a_plain_model_with_equal_features(make, dtype):
    model = make()
    plain_modules = {name: type(module) for name, module in model.named_modules()}
    with_cache(model.to(dtype), TIMESTEPS)
    kept = model.time_proj(torch.tensor(TIMESTEPS))
    expected = call(model, 999)
    restore(model, dtype)
    assert {name: type(module) for name, module in model.named_modules()} == plain_modules
    assert not any(isinstance(module, TimeFeatures) for module in model.modules())
    assert model.dtype == dtype
    tolerance = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    assert relative(call(model, 999), expected) < tolerance
    assert relative(exact_features(model.float(), torch.tensor(TIMESTEPS)), kept) < tolerance


def test_a_restored_table_is_saved_and_loaded_as_a_plain_model(tmp_path):
    model = with_table(tiny_unet())
    expected = call(model, 500)
    restore(model, torch.float32)
    model.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert relative(call(loaded, 500), expected) < 1e-3


def test_restoring_is_the_same_every_time():
    first, second = with_cache(tiny_unet(), TIMESTEPS), with_cache(tiny_unet(), TIMESTEPS)
    torch.manual_seed(11)
    restore(first, torch.float32)
    torch.manual_seed(12)
    restore(second, torch.float32)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_restored_time_path_can_be_trained():
    model = with_cache(tiny_unet(), TIMESTEPS)
    restore(model, torch.float32)
    path = TimePath.find(model)
    assert all(p.requires_grad for layer in path.layers.values() for p in layer.parameters())
    assert why_not_cacheable(model) is None


def test_features_that_no_time_path_of_the_models_width_can_give_are_refused():
    model = with_table(tiny_controlnet())
    with pytest.raises(ValueError, match=r'1001 timesteps cannot be turned back.*time_embedding="keep"'):
        model.time_proj.codes.data = torch.randint(256, model.time_proj.codes.shape, dtype=torch.uint8)
        restore(model, torch.float32)


@every_model
def test_plain_models_can_be_cached(make):
    assert why_not_cacheable(make()) is None


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


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (pixart, "PixArtTransformer2DModel has no ResBlock"),
        (lambda: tiny_unet(time_cond_proj_dim=8), "time_cond_proj_dim"),
        (lambda: tiny_unet(class_embed_type="timestep"), "class_embedding"),
        (lambda: tiny_unet(num_class_embeds=4), "class_embedding"),
        (
            lambda: tiny_unet(
                addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80
            ),
            "add_embedding",
        ),
        (lambda: tiny_unet(time_embedding_type="fourier"), "not the sinusoidal one"),
        (lambda: tiny_unet(time_embedding_act_fn="silu"), "further activation"),
        (lambda: tiny_unet(timestep_post_act="silu"), "further activation"),
        (
            lambda: tiny_unet(
                down_block_types=("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"), resnet_skip_time_act=True
            ),
            "the time projection of down_blocks.1.resnets.0 is not the plain one",
        ),
    ],
)
def test_a_model_whose_features_need_more_than_the_timestep_says_why(make, reason):
    assert reason in why_not_cacheable(make())


def test_the_lookup_of_a_checkpoint_is_made_from_its_description():
    sizes = (("a", 3), ("b", 4))
    cache = empty_lookup(TimeFeaturesSchema("cache", sizes, timesteps=(1.0, 5.0)))
    assert isinstance(cache, TimeFeatureCache) and cache.values.shape == (2, 14)
    table = empty_lookup(TimeFeaturesSchema("table", sizes, num_timesteps=100))
    assert isinstance(table, TimeFeatureTable) and table.codes.shape == (packed_rows(102), 7)


FIRST_AT_1000 = {
    "flow matching": FlowMatchEulerDiscreteScheduler,
    "leading, offset 1": lambda: EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
}


@pytest.mark.parametrize("make", FIRST_AT_1000.values(), ids=FIRST_AT_1000)
def test_schedulers_that_start_at_1000_start_there_with_a_table(make):
    plain = tiny_unet()
    packed = quantize_model(tiny_unet(), BitsFusionConfig(recipe=8, time_embedding="table"), progress=False)
    dequantized = copy.deepcopy(packed).dequantize()
    scheduler = make()
    scheduler.set_timesteps(1000)
    first = scheduler.timesteps[0]
    assert first == 1000
    found, expected = call(packed, first), call(plain, first)
    assert relative(found, expected) < 0.02
    assert relative(call(dequantized, first), found) < 1e-3


def test_a_table_that_is_not_smooth_survives_saving(tmp_path):
    model = quantize_model(tiny_unet(), BitsFusionConfig(recipe=8, time_embedding="table"), progress=False)
    lookup = model.time_proj
    assert lookup.codes.shape[1] == lookup.num_features
    shape = lookup.num_timesteps + 2, lookup.num_features
    codes = torch.randint(-2000, 2000, shape, generator=torch.Generator().manual_seed(0))
    lookup.set_codes(codes.to(torch.int16), lookup.scale.view(torch.float32).view(-1))
    model.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).time_proj
    asked = torch.tensor([0.0, 7.5, 1000.0])
    assert loaded.codes.shape == (shape[0], 2 * shape[1])
    assert torch.equal(loaded(asked), lookup(asked))
