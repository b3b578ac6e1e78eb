"""The look-up of a table of low rank: its values, between timesteps too, in files, compiled and dequantized."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from helpers import smooth_unet
from tiny import tiny_lora, tiny_unet

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.codec.time_schema import TimeFeaturesSchema
from diffusers_bitsfusion.nn.low_rank_time_features import LowRankTimeFeatures
from diffusers_bitsfusion.nn.time_features import TimeFeatureTable
from diffusers_bitsfusion.nn.time_path import TimePath
from diffusers_bitsfusion.packing.time_lookup import make_lookup

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def unet():
    """A UNet whose time path is exactly computed elsewhere."""
    return smooth_unet()


@pytest.fixture(scope="module")
def lookup(unet):
    path = TimePath.find(unet)
    schema = TimeFeaturesSchema("table", tuple(path.sizes), num_timesteps=1000, embedding_width=path.embedding_width)
    found, described = make_lookup(path, schema)
    assert isinstance(found, LowRankTimeFeatures) and found.rank == described.rank > 0
    return found


def exact(unet, timesteps):
    embedding, blocks = TimePath.find(unet).compute(timesteps)
    return torch.cat([*blocks, F.silu(embedding)], dim=1)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("offset", [0, 0.5])
def test_the_look_up_is_near_the_models_own_features(unet, lookup, offset):
    timesteps = torch.arange(1000) + offset
    assert relative(lookup(timesteps), exact(unet, timesteps)) < (0.006 if offset == 0 else 0.01)


def test_whole_steps_have_the_rows_of_the_table(lookup):
    dense = lookup.table.dense()[1:]
    found = lookup(torch.tensor([0, 17, 1000]))
    expected = dense[[0, 17, 1000]]
    features = lookup.num_features
    torch.testing.assert_close(found[:, :features], expected[:, :features], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, features:], F.silu(expected[:, features:]), rtol=1e-4, atol=1e-5)
    assert torch.equal(lookup.features()[1], dense[:, :features])
    assert torch.equal(lookup.embedding(), dense[:, features:])


def test_autocast_and_casts_change_nothing(lookup):
    timesteps = torch.tensor([3.0, 999.0])
    expected = lookup(timesteps)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lookup(timesteps), expected)
    assert torch.equal(copy.deepcopy(lookup).half().bfloat16()(timesteps), expected)


def test_it_compiles_to_one_graph(lookup):
    timesteps = torch.tensor([3.0, 999.0])
    compiled = torch.compile(lookup, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(timesteps), lookup(timesteps))


@pytest.mark.parametrize("asked", [-1.0, 1000.5, float("nan")])
def test_a_timestep_outside_the_table_is_refused(lookup, asked):
    with pytest.raises(ValueError, match="cover the timesteps 0 to 1000"):
        lookup(torch.tensor([5.0, asked]))


def test_it_takes_less_memory_than_a_value_a_timestep(lookup):
    assert sum(p.nbytes for p in lookup.parameters()) < 1002 * (lookup.num_features + lookup.embedding_width)


def test_a_file_says_its_rank_and_loads_to_the_same_features(tmp_path):
    packed = quantize_model(smooth_unet(), BitsFusionConfig(recipe=4, time_embedding="table"), progress=False)
    packed.save_pretrained(tmp_path / "first")
    config = packed.config.quantization_config
    assert config.format_version == 3 and config.schema.time_features.rank == packed.time_proj.rank
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "first")
    for name, tensor in packed.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    loaded.save_pretrained(tmp_path / "second")
    files = [next((tmp_path / part).glob("*.safetensors")).read_bytes() for part in ("first", "second")]
    assert files[0] == files[1]


def test_a_lora_in_a_time_projection_is_saved_in_the_table_of_codes(tmp_path):
    packed = quantize_model(smooth_unet(), BitsFusionConfig(recipe=4, time_embedding="table"), progress=False)
    packed.load_lora_adapter(tiny_lora(smooth_unet(), ("time_emb_proj",)), prefix=None)
    packed.fuse_lora()
    packed.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.format_version == 1
    timesteps = torch.arange(0, 1001, 10)
    block, plain = "down_blocks.0.resnets.0.time_emb_proj", packed.time_proj(timesteps)
    expected = packed.get_submodule(block)(plain)
    assert relative(expected, plain[:, : expected.shape[1]]) > 0.05
    assert relative(loaded.get_submodule(block)(loaded.time_proj(timesteps)), expected) < 0.008  # rounded twice
    assert packed.time_proj.rank > 0


def test_features_that_need_many_functions_are_kept_one_by_one():
    path = TimePath.find(tiny_unet())  # random weights, whose waves of every period count alike
    schema = TimeFeaturesSchema("table", tuple(path.sizes), num_timesteps=1000, embedding_width=path.embedding_width)
    lookup, described = make_lookup(path, schema)
    assert isinstance(lookup, TimeFeatureTable) and described == schema
