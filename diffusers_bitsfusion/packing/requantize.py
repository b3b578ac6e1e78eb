"""Requantization of fused LoRAs into the codes of layers with enough levels."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..codec.quantize_dense import quantize_to_dense
from ..codec.radix import unpack_dense
from ..codec.rounding import Rounding
from ..nn import PackedWeight
from ..nn.compute import packed_layers

# Number of bits from which layers are requantized: with fewer, a step is large against the change by a usual LoRA, and
# rounding loses it (docs/METHOD.md).
MIN_BITS = 6
# Share of a branch's change that requantizing must preserve.
MIN_KEPT = 0.99


@torch.no_grad()
def requantize_branches(model: Any) -> dict[str, float]:
    """Round fused LoRAs into the codes where a layer's levels are fine enough, which removes their branches.

    A layer of at least 6 bits is quantized again, branch included. It stays so if that preserves at least 99 % of the
    branch's change of the weight; else it keeps its branch, as layers of fewer bits do. This cannot be undone.

    Args:
        model: quantized model with branches from `fuse_lora`. Adapters must have been unloaded
            (`unload_lora_weights`), since `unfuse_lora` would have nothing left to remove.

    Returns:
        Preserved share of the change, by name of each layer of at least 6 bits with a branch: <C, B> / <B, B>, where B
        is the branch's product and C the change of the rounded weight.

    Raises:
        ValueError: the model has no packed layers, an adapter is still fused by PEFT, or the weights are offloaded;
            the model is unchanged then.
    """
    packed = packed_layers(model)
    if not packed:
        raise ValueError(f"This {type(model).__name__} has no layers quantized by diffusers_bitsfusion.")
    layers = {name: layer for name, layer in packed.items() if layer.branch_rank and layer.bits >= MIN_BITS}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(
                f"The adapters {', '.join(module.merged_adapters)} are fused into {name} and could not be unfused any "
                "more. Call `unload_lora_weights()` first, which keeps what is fused."
            )
    if offloaded := [name for name, layer in layers.items() if layer.codes.is_meta]:
        raise ValueError(f"The weights of {offloaded[0]} are offloaded; fuse and requantize before offloading.")
    balance = model.hf_quantizer.quantization_config.balance
    return {name: _requantize(layer, balance) for name, layer in layers.items()}


def _requantize(layer: PackedWeight, balance: bool) -> float:
    rows, columns = layer.weight_shape[0], layer.columns
    before = layer.decode(torch.float32).view(rows, columns)
    target = layer.dense_weight(torch.float32).view(rows, columns)
    codes, scale = quantize_to_dense(target, layer.bits, Rounding(balance=balance))
    after = unpack_dense(codes, layer.bits, columns) * scale[:, None]
    branch = target - before
    size = branch.square().sum()
    kept = float(((after - before) * branch).sum() / size) if size else 1.0
    if kept >= MIN_KEPT:
        layer.set_codes(codes, scale)
        layer.shrink_branch(0)
        layer.set_compute(layer.compute, layer.resident)
    return kept
