import json
import math

import pytest

from diffusers_bitsfusion import BitsFusionConfig, Recipe
from diffusers_bitsfusion.codec.schema import FORMAT_VERSION, CheckpointSchema, LayerSchema

CONFIGS = {
    "default": {},
    "uniform bits": {"recipe": 2},
    "mapping": {"recipe": {"conv": 1, "other.conv": 7}},
    "recipe": {"recipe": Recipe({"conv": 3})},
    "name": {"recipe": "stable-diffusion-v1-5"},
    "numbers": {"target_bits": 3, "scale_iterations": 0, "in_out_bits": 4, "balance": False},
    "strings": {"scale_init": "minmax", "time_embedding": "keep", "compression": None},
    "cache": {"time_embedding": {"type": "cache", "timesteps": [1, 21.5, 41]}},
    "tuples": {"modules_to_not_convert": ("conv_in", "attn2"), "components": ("unet",)},
    "resolved": {
        "format_version": FORMAT_VERSION,
        "layers": {"conv": {"bits": 2, "shape": [4, 3]}},
        "time_embedding": {"type": "keep"},
    },
}

every_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)


@every_config
def test_what_is_written_as_json_is_read_back(options):
    config = BitsFusionConfig(**options)
    written = json.loads(json.dumps(config.to_dict()))
    read = BitsFusionConfig.from_dict(written)
    assert isinstance(read, BitsFusionConfig)
    assert json.loads(json.dumps(read.to_dict())) == written
    assert written["quant_method"] == "bitsfusion"
    for name in ("recipe", "target_bits", "scale_init", "balance", "in_out_bits", "time_embedding", "components"):
        assert getattr(read, name) == getattr(config, name)


@every_config
def test_the_difference_to_the_defaults_is_enough_to_rebuild_the_config(options):
    config = BitsFusionConfig(**options)
    difference = json.loads(json.dumps(config.to_diff_dict()))
    assert set(difference) == set(options)
    assert BitsFusionConfig.from_dict(difference).to_dict() == config.to_dict()


def test_a_path_becomes_a_string(tmp_path):
    config = BitsFusionConfig(recipe=tmp_path / "r.json")
    assert json.loads(json.dumps(config.to_dict()))["recipe"] == str(tmp_path / "r.json")


def test_the_written_dict_is_a_copy():
    config = BitsFusionConfig(recipe={"conv": 1}, time_embedding={"type": "cache", "timesteps": [1]})
    written = config.to_dict()
    written["recipe"]["conv"] = 9
    written["time_embedding"]["timesteps"].append(2)
    assert config.recipe == {"conv": 1}
    assert config.time_embedding["timesteps"] == [1]


def test_reading_leaves_the_dict_as_it_was():
    written = BitsFusionConfig(recipe=2).to_dict()
    before = json.dumps(written)
    BitsFusionConfig.from_dict(written)
    assert json.dumps(written) == before


def test_defaults_are_not_shared_between_configs():
    BitsFusionConfig().modules_to_not_convert.append("x")
    BitsFusionConfig().components.append("vae")
    assert BitsFusionConfig().modules_to_not_convert == []
    assert BitsFusionConfig().components == ["unet", "transformer"]


def test_the_defaults_are_the_documented_ones():
    config = BitsFusionConfig()
    assert (config.recipe, config.target_bits, config.scale_init, config.scale_iterations) == (
        "auto",
        1.99,
        "alternating",
        10,
    )
    assert (config.balance, config.in_out_bits, config.compression) == (True, 8, "zstd")
    assert not config.is_resolved


BAD_VALUES = [
    ("recipe", 0),
    ("recipe", 17),
    ("recipe", -1),
    ("recipe", 2.5),
    ("recipe", None),
    ("recipe", True),
    ("recipe", ["conv"]),
    ("target_bits", -1.0),
    ("target_bits", 0),
    ("target_bits", math.nan),
    ("target_bits", math.inf),
    ("target_bits", "2"),
    ("target_bits", None),
    ("target_bits", True),
    ("scale_init", "magic"),
    ("scale_init", None),
    ("scale_iterations", -1),
    ("scale_iterations", 2.5),
    ("scale_iterations", True),
    ("scale_iterations", None),
    ("balance", "no"),
    ("balance", None),
    ("in_out_bits", 0),
    ("in_out_bits", 17),
    ("in_out_bits", 8.0),
    ("in_out_bits", None),
    ("compression", "gzip"),
    ("compression", True),
    ("time_embedding", "never"),
    ("time_embedding", None),
    ("time_embedding", []),
    ("time_embedding", {}),
    ("time_embedding", {"type": "magic"}),
    ("time_embedding", {"type": "cache"}),
    ("time_embedding", {"type": "cache", "timesteps": []}),
    ("time_embedding", {"type": "cache", "timesteps": [1, 1]}),
    ("time_embedding", {"type": "cache", "timesteps": [math.nan]}),
    ("time_embedding", {"type": "cache", "timesteps": ["1"]}),
    ("time_embedding", {"type": "cache", "timesteps": [[1]]}),
    ("time_embedding", {"type": "cache", "timesteps": 5}),
    ("modules_to_not_convert", [1]),
    ("components", [None]),
    ("format_version", "new"),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=str)
def test_an_impossible_value_is_refused_naming_the_argument(name, value):
    with pytest.raises(ValueError, match=name):
        BitsFusionConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=str)
def test_an_impossible_value_in_a_file_is_refused_naming_the_argument(name, value):
    with pytest.raises(ValueError, match=name):
        BitsFusionConfig.from_dict({"quant_method": "bitsfusion", name: value})


@pytest.mark.parametrize("bits", [0, 17, "2", None])
def test_impossible_bits_of_a_layer_are_refused_naming_it(bits):
    with pytest.raises(ValueError, match=r"bits of layer 'down\.conv'"):
        BitsFusionConfig(recipe={"down.conv": bits})


@pytest.mark.parametrize("described", [{"bits": 17, "shape": [4, 3]}, {"bits": 2}, {"shape": [4, 3]}, 2])
def test_a_checkpoint_that_describes_a_layer_wrongly_is_refused_naming_it(described):
    with pytest.raises(ValueError, match=r"down\.conv"):
        BitsFusionConfig(format_version=FORMAT_VERSION, layers={"down.conv": described})


def test_unknown_keys_are_refused_naming_them_and_the_known_ones():
    with pytest.raises(ValueError, match=r"colour, target_bit.*Known are: .*target_bits"):
        BitsFusionConfig.from_dict({"target_bit": 2.0, "colour": "red", "recipe": 2})


def test_unknown_keys_of_a_checkpoint_are_ignored_and_named_once(caplog):
    known = BitsFusionConfig(**CONFIGS["resolved"]).to_dict()
    with caplog.at_level("WARNING"):
        read = BitsFusionConfig.from_dict(known | {"colour": "red", "checksum": 7})
    assert read.to_dict() == known
    assert [record.getMessage() for record in caplog.records if "Ignoring" in record.getMessage()] == [
        "Ignoring unknown keys of the checkpoint's quantization_config: checksum, colour."
    ]


def test_a_wish_has_no_schema():
    with pytest.raises(ValueError, match="has no format_version"):
        BitsFusionConfig().schema  # noqa: B018


@pytest.mark.parametrize(
    ("wrong", "written"),
    [
        ({"target_bit": 2.0}, "target_bit: did you mean target_bits"),
        ({"bits": 3}, r"bits: 3 bits in every layer are BitsFusionConfig\(recipe=3\).* target_bits=3"),
        ({"weight_bits": 2}, r"recipe=2\)"),
        ({"n_bits": 2}, r"recipe=2\)"),
        ({"wbits": 2}, r"recipe=2\)"),
        ({"load_in_4bit": True}, "target_bits"),
        ({"skip_modules": ["conv_in"]}, r"modules_to_not_convert=\[names\]"),
        ({"modules_to_not_converted": []}, "did you mean modules_to_not_convert"),
        ({"calibrate": True}, "did you mean calibration"),
        ({"colour": "red", "bits": 2}, r"arguments: colour, bits\. .*Known are: recipe, .*layers\."),
    ],
    ids=str,
)
def test_an_unknown_argument_is_refused_with_what_to_write(wrong, written):
    with pytest.raises(TypeError, match=written):
        BitsFusionConfig(**wrong)
    with pytest.raises(ValueError, match=written.replace("arguments: colour, bits", "config: bits, colour")):
        BitsFusionConfig.from_dict(wrong)


@pytest.mark.parametrize("more", [1, 10])
def test_a_newer_format_version_is_refused_saying_how_to_upgrade(more):
    version = FORMAT_VERSION + more
    with pytest.raises(ValueError, match=f"format version {version}, newer than.*pip install -U diffusers_bitsfusion"):
        BitsFusionConfig.from_dict({"format_version": version, "layers": {}, "key_of_the_future": 1})


def test_the_format_version_tells_a_checkpoint_from_a_wish():
    assert BitsFusionConfig(
        format_version=FORMAT_VERSION,
        layers={"conv_in": {"bits": 8, "shape": [4, 4, 3, 3]}},
        time_embedding={"type": "keep"},
    ).is_resolved


def test_the_config_applies_to_its_components_only():
    config = BitsFusionConfig(components=["unet", "text_encoder"])
    assert config._resolve_quant_config(is_diffusers=True, module_name="unet") is config
    assert config._resolve_quant_config(is_diffusers=True, module_name="vae") is None
    assert config._resolve_quant_config(is_diffusers=False, module_name="text_encoder") is config
    assert config._resolve_quant_config(is_diffusers=False, module_name="text_encoder_2") is None


def test_the_representation_shows_the_method_and_its_values():
    text = repr(BitsFusionConfig(target_bits=2.75))
    assert "BitsFusionConfig" in text and "2.75" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute": "int4"}, "compute must be one of"),
        ({"resident": "bf16", "compute": "int8"}, "resident must be one of"),
        ({"resident": "int8"}, 'resident="int8" is for compute="int8" only'),
    ],
)
def test_impossible_computations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BitsFusionConfig(**options)


def test_a_checkpoint_does_not_say_how_to_compute():
    config = BitsFusionConfig(compute="int8", resident="int8")
    assert BitsFusionConfig.from_dict(config.to_dict()).compute == "int8"
    config = config.resolved(CheckpointSchema({"conv": LayerSchema(2, (4, 3))}))
    assert config.to_dict()["compute"] == "auto" and config.to_dict()["resident"] == "packed"


def test_a_checkpoint_does_not_say_where_its_recipe_lay(tmp_path):
    file = tmp_path / "r.json"
    Recipe({"conv": 3}).save(file)
    resolved = {
        "format_version": 1,
        "layers": {"conv": {"bits": 3, "shape": [2, 2]}},
        "time_embedding": {"type": "keep"},
    }
    config = BitsFusionConfig(recipe=file, **resolved)
    assert config.to_dict()["recipe"] == "r.json"
    assert BitsFusionConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert BitsFusionConfig(recipe=file).to_dict()["recipe"] == str(file)
    hub = BitsFusionConfig(recipe="someone/recipes", **resolved)
    assert hub.to_dict()["recipe"] == "someone/recipes"
