"""Parameters of every kind of layer as codes: what they compute, save, load, and turn back into."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from peft import LoraConfig, inject_adapter_in_model
from test_format import read_layers
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from diffusers_bitsfusion import BitsFusionConfig, convert, prepare_qat, quantize_model, size_report
from diffusers_bitsfusion.codec.scales import quantize_rows
from diffusers_bitsfusion.nn import packed_tensor
from diffusers_bitsfusion.nn.packed_tensor import HoldsPackedTensors, PackedTensor, packed_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")


class CausalConv3d(nn.Conv3d):
    """As the causal convolutions of video autoencoders: pads in time by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 0, 0, 0, 2, 0)))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.down = nn.Parameter(torch.randn(3, 8, 10) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.down).sum(0)


class EveryKind(ModelMixin, ConfigMixin):
    """A chain of layers of every kind that is packed beside Linear and Conv2d."""

    @register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.conv1 = nn.Conv1d(width, width, 3, padding=1, groups=2)
        self.up1 = nn.ConvTranspose1d(width, width, 4, stride=2, padding=1, groups=2)
        self.normed = nn.utils.weight_norm(nn.Conv1d(width, width, 3, padding=1))
        self.up_normed = nn.utils.weight_norm(nn.ConvTranspose1d(width, width, 3, padding=1))
        self.new_normed = parametrizations.weight_norm(nn.Conv1d(width, width, 1))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up2 = nn.ConvTranspose2d(width, 6, 2, stride=2)
        self.conv3 = CausalConv3d(6, 7, 3, padding=(0, 1, 1))
        self.up3 = nn.ConvTranspose3d(7, width, (1, 2, 2), bias=False)
        self.experts = Experts()
        self.linear = nn.Linear(10, 4)

    def forward(self, tokens: Tensor, added: Tensor) -> Tensor:
        x = (self.embedding(tokens) + added).transpose(1, 2)
        x = self.new_normed(self.up_normed(self.normed(self.up1(self.conv1(x)))))
        x = x.transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        x = self.up2(x.transpose(1, 2).unflatten(2, (2, -1)))
        x = self.up3(self.conv3(x.unsqueeze(2)))
        return self.linear(self.experts(x.flatten(2).transpose(1, 2)))


NAMES = {
    "conv1.packed_weight", "up1.packed_weight", "normed.packed_weight_v", "up_normed.packed_weight_v",
    "new_normed.parametrizations.weight.packed_original1", "attention.packed_in_proj_weight", "up2.packed_weight",
    "conv3.packed_weight", "up3.packed_weight", "experts.packed_down",
}  # fmt: skip
INPUTS = torch.arange(6).view(1, 6), torch.linspace(-1, 1, 48).view(1, 6, 8)


def call(model: nn.Module, dtype=None) -> Tensor:
    with torch.no_grad():
        return model(INPUTS[0], INPUTS[1].to(dtype or model.dtype))


def float_model() -> EveryKind:
    torch.manual_seed(0)
    return EveryKind().eval()


@pytest.fixture(scope="module")
def packed() -> EveryKind:
    return quantize_model(float_model(), BitsFusionConfig(recipe=3), progress=False)


def test_every_kind_is_packed_and_the_embedding_by_choice(packed):
    layers = {"attention.out_proj", "linear"}
    assert packed.config.quantization_config.layers.keys() == NAMES | layers
    chosen = packed_with_embedding()
    assert chosen.config.quantization_config.layers.keys() == NAMES | layers | {"embedding.packed_weight"}
    assert packed.num_parameters() == chosen.num_parameters() == float_model().num_parameters()


def packed_with_embedding() -> EveryKind:
    return quantize_model(float_model(), BitsFusionConfig(recipe=3, embeddings=True), progress=False)


@pytest.mark.parametrize("shape", [(), (3,), (2, 4), (0,), (4, 5), (6, 7)], ids=str)
def test_a_look_up_gives_the_rows_of_the_dequantized_table_and_decodes_no_other(shape, monkeypatch):
    embedding = packed_with_embedding().embedding
    rows = embedding.weight.clone()
    tokens = torch.randint(20, shape, generator=torch.Generator().manual_seed(1))
    decoded = []
    original = packed_tensor.weight
    monkeypatch.setattr(packed_tensor, "weight", lambda *args: (decoded.append(args[3][0]), original(*args))[1])
    assert torch.equal(embedding(tokens), nn.functional.embedding(tokens, rows))
    assert decoded == [tokens.numel() if 0 < tokens.numel() < 20 else 20]
    with pytest.raises(IndexError, match="out of range"):
        embedding(torch.tensor([20]))


def test_an_adapter_of_a_packed_table_learns_what_it_learns_beside_the_dequantized_one():
    tokens = torch.tensor([[1, 3, 3], [7, 19, 0]])
    results = []
    for is_packed in (True, False):
        model = packed_with_embedding()
        model = model if is_packed else model.dequantize().requires_grad_(False)
        config = LoraConfig(r=2, target_modules=["embedding"], init_lora_weights=False)
        torch.manual_seed(4)
        embedding = inject_adapter_in_model(config, model).embedding
        output = embedding(tokens)
        output.square().sum().backward()
        factors = embedding.lora_embedding_A, embedding.lora_embedding_B
        results.append([output, *(factor["default"].grad for factor in factors)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
        assert expected.any()


def test_training_says_what_it_leaves_in_floating_point(packed, caplog):
    layers = packed.config.quantization_config.layers
    names = [name.replace("packed_", "") for name in NAMES]
    weights = {name: value.numel() for name, value in float_model().named_parameters()}
    left, trained = (
        sum(weights[name] for name in names),
        weights["linear.weight"] + weights["attention.out_proj.weight"],
    )
    with caplog.at_level(logging.WARNING, logger="diffusers_bitsfusion"):
        model = convert(prepare_qat(float_model(), BitsFusionConfig(recipe=3)))
    assert f"{100 * left / (left + trained):.2g} % of the weights of this EveryKind" in caplog.text
    assert model.config.quantization_config.layers.keys() == layers.keys() - NAMES
    with pytest.raises(ValueError, match=r"has no Linear or Conv2d layer to fake-quantize.*conv1\.weight"):
        prepare_qat(float_model(), BitsFusionConfig(recipe=3, modules_to_not_convert=["linear", "out_proj"]))


def test_values_are_rounded_by_output_channel(packed):
    weight = float_model().up2.weight.detach()  # [in, out, height, width]
    codes, scale = quantize_rows(weight.transpose(0, 1).flatten(1), 3)
    expected = (codes * scale[:, None]).view(6, 8, 2, 2).transpose(0, 1)
    assert torch.equal(packed.up2.weight.detach().clone(), expected)
    experts = float_model().experts.down.detach()  # [experts, in, out]
    codes, scale = quantize_rows(experts.transpose(1, 2).flatten(0, 1), 3)
    expected = (codes * scale[:, None]).view(3, 10, 8).transpose(1, 2)
    assert torch.equal(packed.experts.down.detach().clone(), expected)


def test_it_computes_what_the_dequantized_model_does_before_and_after_a_reload(packed, tmp_path):
    found = call(packed)
    assert not torch.equal(found, call(float_model()))
    packed.save_pretrained(tmp_path)
    loaded = EveryKind.from_pretrained(tmp_path)
    assert torch.equal(call(loaded), found)
    assert torch.equal(call(copy.deepcopy(packed)), found)
    again = pickle.loads(pickle.dumps(packed.conv3))  # torch pickles no parametrized module, such as new_normed
    assert torch.equal(again.weight, packed.conv3.weight)
    plain = loaded.dequantize().requires_grad_(False)
    assert torch.equal(call(plain), found)
    assert plain.state_dict().keys() == float_model().state_dict().keys()
    assert not any(isinstance(part, (HoldsPackedTensors, PackedTensor)) for part in plain.modules())


@pytest.mark.parametrize("shards", ["10GB", "2KB"])
def test_quantizing_while_loading_is_quantizing_in_memory(packed, shards, tmp_path):
    float_model().save_pretrained(tmp_path, max_shard_size=shards)
    loaded = EveryKind.from_pretrained(tmp_path, quantization_config=BitsFusionConfig(recipe=3))
    assert torch.equal(call(loaded), call(packed))


def test_gradients_reach_the_input_and_no_weight(packed):
    # A copy would do but for the old weight normalisation, which keeps a tensor that torch refuses to copy.
    plain = (
        quantize_model(float_model(), BitsFusionConfig(recipe=3), progress=False).dequantize().requires_grad_(False)
    )
    gradients = []
    for model in (packed, plain):
        added = INPUTS[1].clone().requires_grad_()
        model(INPUTS[0], added).sum().backward()
        gradients.append(added.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()
    with pytest.raises(RuntimeError, match="can neither be written to nor trained"):
        packed.conv3.weight.data += 1
    with pytest.raises(RuntimeError, match="can neither be written to nor trained"):
        packed.conv3.weight = nn.Parameter(torch.zeros(1))


def test_half_precision_and_no_decoding_for_metadata(decodes):
    model = quantize_model(float_model().half(), BitsFusionConfig(recipe=3), progress=False)
    weight = model.conv3.weight
    assert (weight.dtype, tuple(weight.shape)) == (torch.float16, (7, 6, 3, 3, 3)) and decodes["read"] == 0
    output = call(model)
    assert output.dtype == torch.float16
    assert torch.equal(output, call(copy.deepcopy(model).dequantize().requires_grad_(False)))


def test_one_graph(packed):
    compiled = torch.compile(packed.conv3, fullgraph=True, backend="eager")
    x = torch.randn(1, 6, 2, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), packed.conv3(x))


def test_the_file_is_of_the_second_version_which_the_reader_on_the_page_knows(packed, tmp_path):
    packed.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2 and "embeddings" not in config
    assert config["layers"]["up2.packed_weight"] == {"bits": 3, "shape": [6, 8, 2, 2], "order": [1, 0, 2, 3]}
    weights = read_layers(tmp_path)
    for name, tensor in packed_tensors(packed).items():
        assert (weights[name] == tensor.decode().numpy()).all(), name


def test_a_checkpoint_of_other_geometry_is_refused(packed, tmp_path):
    packed.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["layers"]["up2.packed_weight"]["order"] = [1, 0, 3, 2]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"up2\.packed_weight.*EveryKind has"):
        EveryKind.from_pretrained(tmp_path)


@pytest.mark.parametrize("wrong", [{"order": [0, 0]}, {"order": "10"}, {"row_dims": 0}, {"row_dims": 3}])
def test_impossible_geometry_is_refused(wrong):
    layer = {"bits": 2, "shape": [4, 3]} | wrong
    time = {"type": "keep"}
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} of layer 'a.packed_weight' must"):
        BitsFusionConfig(format_version=2, layers={"a.packed_weight": layer}, time_embedding=time)


def test_a_recipe_of_layers_alone_leaves_other_parameters(tmp_path):
    recipe = {"linear": 2, "attention.out_proj": 2}
    model = quantize_model(float_model(), BitsFusionConfig(recipe=recipe), progress=False)
    assert (
        model.config.quantization_config.layers.keys() == recipe.keys()
        and model.config.quantization_config.format_version == 1
    )
    named = recipe | {"conv3.packed_weight": 4}
    model = quantize_model(float_model(), BitsFusionConfig(recipe=named), progress=False)
    assert model.config.quantization_config.layers.keys() == named.keys()


def test_the_report_and_the_card_say_what_is_left(packed, tmp_path):
    model = quantize_model(float_model(), BitsFusionConfig(recipe=3, modules_to_not_convert=["conv3"]), progress=False)
    left = size_report(model).left
    assert left["named in modules_to_not_convert"] == 7 * 6 * 27
    assert left["embeddings, which embeddings=True packs"] == 160
    model.save_pretrained(tmp_path)
    assert size_report(tmp_path).left == left
    assert (
        "| left in floating point | 160 weights: embeddings, which embeddings=True packs |"
        in (tmp_path / "README.md").read_text()
    )
