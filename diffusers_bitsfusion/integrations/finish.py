"""The last step of every way to a packed model: what diffusers and transformers expect to find on it."""

from __future__ import annotations

import functools

import torch
from diffusers import ModelMixin
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.utils import logging
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer

from ..allocation.average_bits import average_bits
from ..config.bitsfusion import BitsFusionConfig
from ..nn.compute import set_compute
from ..reporting.model_card import NOISY_BITS, predicts_noise
from .saving import as_quantized_model

logger = logging.get_logger(__name__)


def finish(
    model: ModelMixin | PreTrainedModel,
    quantizer: DiffusersQuantizer | HfQuantizer,
    config: BitsFusionConfig,
    dtype: torch.dtype | None = None,
) -> None:
    """Set on a model whose layers are packed what loading a packed one sets, so that all behave alike.

    Args:
        model: of diffusers or transformers.
        quantizer: that packed or loaded it; it answers for the model from now on.
        config: of the packed checkpoint.
        dtype: of the model before it was quantized; the loaders of diffusers and transformers record it themselves.
    """
    quantizer.quantization_config = config
    quantizer.pre_quantized = True
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    if isinstance(model, PreTrainedModel):
        model.config.quantization_config = config
        return
    _own_memory(model, decoded=config.compression is not None)
    set_compute(model, config.compute, config.resident)
    model.register_to_config(quantization_config=config)
    if dtype is not None:
        model.register_to_config(_pre_quantization_dtype=dtype)
    as_quantized_model(model)


def _own_memory(model: ModelMixin, decoded: bool) -> None:
    """Copy what was not packed or decoded here: a single view would keep the whole file mapped into memory."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not (decoded and name.endswith(".codes")):
            parameter.data = parameter.data.clone()


def warn_untrained(model: ModelMixin, config: BitsFusionConfig) -> None:
    """Say once that images will be noise, where they will be, and diffusers' verbosity lets warnings through.

    Args:
        model: that was quantized.
        config: of the packed checkpoint.
    """
    layers = {name: (layer.bits, layer.num_weights) for name, layer in config.schema.layers.items()}
    is_coarse = average_bits(layers, balance=config.balance).layers < NOISY_BITS
    if is_coarse and predicts_noise(model) and not config.calibration and logging.get_verbosity() <= logging.WARNING:
        _warn_once()


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "Layers were rounded after training. At about 2 bits a Stable Diffusion model then draws noise until it is "
        "calibrated (`quantize_model(pipeline, config, calibration=True)`) or trained in this precision "
        "(quantization-aware training); see the README of diffusers_bitsfusion."
    )
