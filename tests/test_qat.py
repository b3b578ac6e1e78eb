import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import relative_error
from peft import LoraConfig
from tiny import tiny_unet
from torch import nn

from diffusers_bitsfusion import BitsFusionConfig, Recipe, convert, prepare_qat, quantize_model, size_report
from diffusers_bitsfusion.qat import qat_layers

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(unet, steps=3):
    """A few steps of training towards noise: every scale and weight moves."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for step in range(steps):
        sample = torch.randn(2, 4, 8, 8, generator=generator)
        states = torch.randn(2, 5, 32, generator=generator)
        loss = (unet(sample, 37 * step, states).sample - sample.flip(0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return unet


@pytest.mark.parametrize("kind", ["keep", "table", "cache"])
def test_untrained_it_converts_to_what_quantize_model_gives(kind, make_config):
    expected = quantize_model(tiny_unet(), make_config(time_embedding=kind), progress=False)
    found = convert(prepare_qat(tiny_unet(), make_config(time_embedding=kind)))
    names = {name: value for name, value in expected.named_parameters()}
    assert {name for name, _ in found.named_parameters()} == set(names)
    for name, value in found.named_parameters():
        assert torch.equal(value, names[name]), name
    assert found.config == expected.config
    assert type(found).__name__ == type(expected).__name__
    assert found.hf_quantizer.quantization_config.to_dict() == expected.hf_quantizer.quantization_config.to_dict()


@pytest.mark.parametrize(("kind", "tolerance"), [("keep", 1e-5), ("cache", 1e-3), ("table", 1e-2)])
def test_the_packed_model_computes_what_training_saw(kind, tolerance, make_config, call_unet):
    time_embedding = {"type": "cache", "timesteps": [1, 501]} if kind == "cache" else kind
    unet = trained(prepare_qat(tiny_unet(), make_config(time_embedding=time_embedding)))
    expected = call_unet(unet)
    assert relative_error(call_unet(convert(unet)), expected) < tolerance


def test_the_packed_model_is_saved_reloaded_and_dequantized(tmp_path, make_config, call_unet):
    unet = convert(trained(prepare_qat(tiny_unet(), make_config())))
    expected = call_unet(unet)
    unet.save_pretrained(tmp_path)
    reloaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(call_unet(reloaded), expected)
    assert size_report(tmp_path).histogram == size_report(unet).histogram
    torch.testing.assert_close(call_unet(unet.dequantize()), expected, rtol=1e-4, atol=1e-5)
    unet.save_pretrained(tmp_path / "plain")
    assert type(unet) is UNet2DConditionModel


def test_converting_to_half_precision_does_not_touch_codes_and_scales(make_config, call_unet):
    unet = trained(prepare_qat(tiny_unet(), make_config()))
    full, half = convert(copy.deepcopy(unet)), convert(unet, dtype=torch.bfloat16)
    for (name, a), b in zip(full.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(a.bfloat16() if a.is_floating_point() else a, b), name
    assert half.dtype == torch.bfloat16 and call_unet(half).dtype == torch.bfloat16


def test_training_moves_everything_and_lowers_the_loss(make_config):
    unet = prepare_qat(tiny_unet(), make_config())
    before = {name: value.detach().clone() for name, value in unet.named_parameters()}
    trained(unet)
    still = [name for name, value in unet.named_parameters() if torch.equal(value, before[name])]
    assert still == []


def test_gradient_checkpointing_gives_the_same_gradients(make_config):
    gradients = []
    for checkpointing in (False, True):
        unet = prepare_qat(tiny_unet(), make_config()).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        generator = torch.Generator().manual_seed(0)
        sample, states = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
        unet(sample, 10, states).sample.square().sum().backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_state_dict_round_trip(make_config, call_unet):
    unet = trained(prepare_qat(tiny_unet(), make_config()))
    other = prepare_qat(tiny_unet(seed=1), make_config())
    other.load_state_dict(unet.state_dict())
    assert torch.equal(call_unet(other), call_unet(unet))


def test_one_layer_alone(call_unet):
    name = "mid_block.resnets.0.conv1"
    unet = tiny_unet().requires_grad_(False)
    original, plain = unet.get_submodule(name), call_unet(unet)
    prepare_qat(unet, BitsFusionConfig(recipe=1), layers=[name])
    assert list(qat_layers(unet)) == [name] and unet.get_submodule(name).bits == 1
    assert {n for n, p in unet.named_parameters() if p.requires_grad} == {f"{name}.weight", f"{name}.scale"}
    assert not torch.equal(call_unet(unet), plain)
    trained_layer = trained(unet).get_submodule(name)
    assert not torch.equal(trained_layer.weight, original.weight)
    unet.set_submodule(name, original)
    assert torch.equal(call_unet(unet), plain)


def test_recipe_and_grid_are_those_of_the_config():
    recipe = Recipe({"conv_in": 5} | {name: 3 for name, m in tiny_unet().named_modules() if _is_ordinary(name, m)})
    unet = prepare_qat(tiny_unet(), BitsFusionConfig(recipe=recipe, balance=False))
    layers = qat_layers(unet)
    assert layers["conv_in"].bits == 5 and layers["mid_block.resnets.0.conv1"].bits == 3
    assert layers["conv_out"].bits == 8
    assert not any(layer.balance for layer in layers.values())
    assert float(layers["mid_block.resnets.0.conv1"].codes_and_scale()[0].max()) == 3  # -4 ... 3


def _is_ordinary(name, module):
    time = "time_emb" in name
    return isinstance(module, (nn.Linear, nn.Conv2d)) and name not in ("conv_in", "conv_out") and not time


def test_saving_in_training_is_refused_until_converted(make_config, tmp_path):
    prepared = copy.deepcopy(prepare_qat(tiny_unet(), make_config()))  # as an average of weights copies it
    with pytest.raises(ValueError, match=r"in training: .* Save `convert\(model\)`"):
        prepared.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    convert(prepared).save_pretrained(tmp_path)
    assert UNet2DConditionModel.from_pretrained(tmp_path).is_quantized


def test_training_a_packed_model_whole_is_warned_of(make_config, caplog):
    unet = quantize_model(tiny_unet(), make_config(), progress=False)
    caplog.clear()  # of the warning of noise
    assert unet.eval() is unet and not caplog.records
    assert unet.train() is unet and unet.training
    assert "biases and norms can be trained. Add an adapter" in caplog.text
    caplog.clear()
    unet.requires_grad_(False).train()
    unet.add_adapter(LoraConfig(target_modules=["to_q"]))
    unet.train()
    assert not caplog.records


def test_bad_input(make_config):
    with pytest.raises(ValueError, match=r"not in training. Call `prepare_qat"):
        convert(tiny_unet())
    with pytest.raises(ValueError, match="does not quantize: conv_nowhere"):
        prepare_qat(tiny_unet(), make_config(), layers=["conv_nowhere"])
    prepared = prepare_qat(tiny_unet(), make_config())
    for again in (prepare_qat, quantize_model):
        with pytest.raises(ValueError, match=r"prepared for training. `convert\(\)` packs it"):
            again(prepared, make_config())
    with pytest.raises(ValueError, match="quantized already"):
        prepare_qat(quantize_model(tiny_unet(), make_config(), progress=False), make_config())
    broken = tiny_unet()
    broken.conv_out.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"Cannot quantize: conv_out.weight holds NaN"):
        prepare_qat(broken, make_config())
    prepared.conv_norm_out.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"Cannot convert: conv_norm_out.bias holds NaN"):
        convert(prepared)
