"""Fused LoRAs rounded into the codes, against the weights before and the sum that they should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import all_packed_layers
from tiny import tiny_lora, tiny_unet

from diffusers_bitsfusion import Recipe, quantize_model, requantize_branches, size_report
from diffusers_bitsfusion.packing.planning import recipe_layers

pytestmark = pytest.mark.usefixtures("one_thread")
TARGETS = ("to_q", "to_k", "ff.net.2", "conv1", "proj_in")
BITS = (2, 5, 6, 7, 8)


def fused_unet(make_config, relative: float, balance: bool = True) -> UNet2DConditionModel:
    """Layers of all of `BITS` in turn, with a fused LoRA of `relative` times the weights' standard deviation."""
    unet = tiny_unet()
    bits = {name: BITS[index % len(BITS)] for index, name in enumerate(recipe_layers(unet))}
    unet = quantize_model(unet, make_config(recipe=Recipe(bits), balance=balance), progress=False)
    lora = tiny_lora(unet, TARGETS, 4, 0)
    for name, layer in all_packed_layers(unet).items():
        if f"{name}.lora_A.weight" in lora:
            down, up = (lora[f"{name}.lora_{half}.weight"] for half in "AB")
            lora[f"{name}.lora_B.weight"] = up * (
                relative * layer.weight.std() / (up.flatten(1) @ down.flatten(1)).std()
            )
    unet.load_lora_adapter(lora, prefix=None)
    unet.fuse_lora()
    return unet


def weights(unet) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Decoded weights and branches of the layers that have one."""
    found = {}
    for name, layer in all_packed_layers(unet).items():
        if layer.branch_rank:
            decoded = layer.decode(torch.float32)
            found[name] = decoded.double().numpy(), (layer.dense_weight(torch.float32) - decoded).double().numpy()
    return found


@pytest.mark.parametrize("relative", [0.05, 0.2])
@pytest.mark.parametrize("balance", [True, False])
def test_a_branch_goes_into_the_codes_where_they_keep_it(make_config, call_unet, tmp_path, relative, balance):
    unet = fused_unet(make_config, relative, balance)
    unet.unload_lora()
    before, output, size = weights(unet), call_unet(unet), size_report(unet)
    kept = requantize_branches(unet)

    layers = all_packed_layers(unet)
    assert set(kept) == {name for name in before if layers[name].bits >= 6}
    rounded = [name for name in kept if layers[name].branch_rank == 0]
    assert rounded and any(layers[name].bits == 8 for name in rounded)
    for name, (decoded, branch) in before.items():
        change = layers[name].decode(torch.float32).double().numpy() - decoded
        if name in rounded:
            share = (change * branch).sum() / (branch * branch).sum()
            assert share >= 0.99 and share == pytest.approx(kept[name], abs=1e-5)
        else:
            assert not change.any() and kept.get(name, 0) < 0.99
            assert layers[name].branch_rank == 4

    assert (call_unet(unet) - output).norm() < 0.05 * output.norm()
    part = "LoRA branches"
    assert size_report(unet).parts[part] == size.parts[part] - sum(4 * 4 * sum(_sides(layers[n])) for n in rounded)
    unet.save_pretrained(tmp_path)
    assert torch.equal(call_unet(UNet2DConditionModel.from_pretrained(tmp_path)), call_unet(unet))


def _sides(layer) -> tuple[int, int]:
    return layer.weight_shape[0], layer.columns


def test_six_bits_hold_a_strong_lora_and_refuse_a_weak_one(make_config):
    shares = {}
    for relative in (0.02, 0.2):
        unet = fused_unet(make_config, relative)
        unet.unload_lora()
        of_six = [name for name, layer in all_packed_layers(unet).items() if layer.bits == 6 and layer.branch_rank]
        kept = requantize_branches(unet)
        shares[relative] = [kept[name] for name in of_six]
    assert max(shares[0.02]) < 0.99 <= min(shares[0.2])


def test_a_branch_of_zeros_goes(make_config):
    unet = fused_unet(make_config, 0)
    unet.unload_lora()
    kept = requantize_branches(unet)
    assert kept and all(share == 1 for share in kept.values())
    assert not any(all_packed_layers(unet)[name].branch_rank for name in kept)


def test_integer_products_take_the_new_codes(make_config, call_unet):
    unet = fused_unet(make_config, 0.2)
    unet.unload_lora()
    layers = all_packed_layers(unet).values()
    for layer in layers:
        layer.set_compute("int8", "int8")
    requantize_branches(unet)
    found = call_unet(unet)
    for layer in layers:
        layer.set_compute("int8", "packed")
    assert torch.equal(found, call_unet(unet))


def test_nothing_changes_while_adapters_could_still_be_unfused(make_config):
    unet = fused_unet(make_config, 0.2)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with pytest.raises(ValueError, match=r"default_0 are fused into .* Call `unload_lora_weights\(\)` first"):
        requantize_branches(unet)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_a_model_without_branches_and_one_that_is_not_packed(make_config):
    assert requantize_branches(quantize_model(tiny_unet(), make_config(), progress=False)) == {}
    with pytest.raises(ValueError, match="This UNet2DConditionModel has no layers quantized"):
        requantize_branches(tiny_unet())
