"""Layers that a ControlNet shares with its transformer, and motion modules that UNets copy."""

from __future__ import annotations

import pytest
import torch
from conformance import image_models, unets
from diffusers import MotionAdapter, ZImageControlNetModel

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.nn import PackedWeight

pytestmark = pytest.mark.usefixtures("one_thread")


def build(name: str) -> torch.nn.Module:
    return (image_models.CASES | unets.CASES)[name].build(name)


def pack(model: torch.nn.Module) -> torch.nn.Module:
    return quantize_model(model, BitsFusionConfig(recipe=4, time_embedding="keep"), progress=False)


def packed_layers(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, PackedWeight)}


@pytest.mark.parametrize("packs_transformer", [False, True])
def test_a_controlnet_leaves_what_it_shares_to_its_transformer(packs_transformer, tmp_path):
    alone = packed_layers(pack(build("ZImageControlNetModel")))
    transformer, controlnet = build("ZImageTransformer2DModel"), build("ZImageControlNetModel")
    if packs_transformer:
        pack(transformer)
    before = packed_layers(transformer)
    ZImageControlNetModel.from_transformer(controlnet, transformer)
    pack(controlnet)
    shared = {name for name in packed_layers(controlnet) if name.startswith("noise_refiner.")}
    assert packed_layers(transformer) == before
    assert bool(shared) == packs_transformer
    assert controlnet.config.quantization_config.layers.keys() == alone
    assert controlnet.noise_refiner is transformer.noise_refiner
    controlnet.save_pretrained(tmp_path)
    assert packed_layers(ZImageControlNetModel.from_pretrained(tmp_path)) == alone
    controlnet.dequantize()
    assert packed_layers(transformer) == before


def test_motion_modules_are_not_mixed_nor_saved_as_plain_ones(tmp_path):
    plain, packed = build("UNetMotionModel"), pack(build("UNetMotionModel"))
    adapter = MotionAdapter((32, 64), 1, motion_num_attention_heads=2, motion_norm_num_groups=16)
    norms = [value.clone() for name, value in packed.named_parameters() if "norm" in name]
    with pytest.raises(ValueError, match="those of UNetMotionModel alone are packed"):
        packed.load_motion_modules(adapter)
    found = [value for name, value in packed.named_parameters() if "norm" in name]
    assert all(map(torch.equal, found, norms))
    with pytest.raises(ValueError, match=r"packed.*dequantize.*save_pretrained"):
        packed.save_motion_modules(tmp_path)
    plain.load_motion_modules(adapter)
    found = plain.mid_block.motion_modules[0].proj_in.weight
    assert torch.equal(found, adapter.mid_block.motion_modules[0].proj_in.weight)
    with pytest.raises(ValueError, match="those of MotionAdapter alone are packed"):
        plain.load_motion_modules(pack(adapter))
