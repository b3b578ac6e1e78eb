"""Numbers of parameters of packed models: those of the model in full precision, since a code is no parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..config.bitsfusion import BitsFusionConfig
from ..nn import PackedWeight, TimeFeatures
from ..nn.low_rank_branch import LowRankBranch
from ..nn.packed_tensor import PackedTensor, num_packed_weights


def num_packed_parameters(model: Any) -> int:
    """Return how many more parameters a packed model had in full precision than it has tensor elements now."""
    count: int = model.hf_quantizer.quantization_config.time_embedding.get("removed_parameters", 0)
    for module in model.modules():
        if isinstance(module, PackedWeight):
            count += torch.Size(module.weight_shape).numel()
        elif isinstance(module, PackedTensor):
            count += num_packed_weights(module)
        if isinstance(module, (LowRankBranch, PackedTensor, TimeFeatures)):
            count -= sum(p.numel() for name, p in module.named_parameters(recurse=False) if name != "bias")
    return count


def wrap_num_parameters(original: Callable[..., int]) -> Callable[..., int]:
    """Wrap `num_parameters` of transformers' models, whose class a packed text encoder keeps."""

    @functools.wraps(original)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        stored = original(self, only_trainable, exclude_embeddings)
        quantizer = getattr(self, "hf_quantizer", None)
        is_packed = isinstance(getattr(quantizer, "quantization_config", None), BitsFusionConfig)
        return stored + num_packed_parameters(self) if is_packed and not only_trainable else stored

    return num_parameters
