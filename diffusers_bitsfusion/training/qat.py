"""`prepare_qat` and `convert`: to trainable layers and from them to packed ones (paper, section 6)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers import ModelMixin

from ..codec.radix import pack_dense
from ..config import FORMAT_VERSION, BitsFusionConfig
from ..nn.convert import packed_twin, replace_module
from ..nn.trainable import QATConv2d, QATLinear, trainable_twin
from ..packing import install_time_features, refuse_dispatched
from ..plan import Plan, make_plan
from ..quantizer import BitsFusionQuantizer


@dataclass
class QATState:
    """What a model in training carries as `model.qat_state`, for `convert`.

    Attributes:
        config: what was asked for.
        plan: what it means for this model.
    """

    config: BitsFusionConfig
    plan: Plan


def trainable_layers(model: torch.nn.Module) -> dict[str, QATLinear | QATConv2d]:
    """Layers in quantization-aware training, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (QATLinear, QATConv2d))}


def prepare_qat(
    model: ModelMixin, config: BitsFusionConfig | None = None, layers: Iterable[str] | None = None
) -> ModelMixin:
    """Make the layers that `quantize_model` would pack trainable at their bits, in place.

    Each becomes a `QATLinear` or `QATConv2d`, an `nn.Linear` or `nn.Conv2d` with an fp32 latent `weight` and an fp32
    `scale` [out], both requiring gradients, and rounds to the same codes and scales as post-training quantization.
    Everything else stays as it is, time embedding included: `convert` replaces that by the look-up that the config
    asks for. Load the model in fp32 and train under autocast.

    Args:
        model: a diffusers model that is not quantized.
        config: as for `quantize_model`; `BitsFusionConfig()` when left out.
        layers: names of the layers to make trainable, the others staying in floating point; all when left out. To
            study one layer alone: `prepare_qat(unet, BitsFusionConfig(recipe=2), layers=["conv_in"])`. The layer that
            was there is not touched, and can be put back.

    Returns:
        The same object.

    Raises:
        ValueError: it is quantized, prepared or offloaded already, holds NaN or infinite weights, the config does not
            suit it, or `layers` names one that the config does not quantize.
    """
    refuse_dispatched(model, "prepare")
    config = copy.deepcopy(config or BitsFusionConfig())
    plan = make_plan(model, config, model._keep_in_fp32_modules or [])
    if layers is not None:
        plan.bits = _selected(plan.bits, layers)
    for name, bits in plan.bits.items():
        try:
            layer = trainable_twin(
                model.get_submodule(name),
                bits,
                scale_init=config.scale_init,
                scale_iterations=config.scale_iterations,
                balance=config.balance,
            )
        except ValueError as error:
            raise ValueError(f"Cannot quantize {name}.weight: {error}.") from error
        replace_module(model, name, layer)
    model.qat_state = QATState(config, plan)
    return model


def _selected(bits: dict[str, int], layers: Iterable[str]) -> dict[str, int]:
    chosen = set(layers)
    unknown = sorted(chosen - set(bits))
    if unknown:
        raise ValueError(f"layers names what the config does not quantize: {', '.join(unknown)}.")
    return {name: count for name, count in bits.items() if name in chosen}


@torch.no_grad()
def convert(model: ModelMixin, dtype: torch.dtype | None = None) -> ModelMixin:
    """Pack a model prepared by `prepare_qat`, in place: what it rounds to becomes what it is.

    Args:
        model: the trained model, unwrapped (`accelerator.unwrap_model`).
        dtype: dtype of what stays in floating point (biases, norms); the model's own when left out.

    Returns:
        The same object, as `quantize_model` gives it: it can be saved, reloaded, dequantized.

    Raises:
        ValueError: it was not prepared, is offloaded, or holds NaN or infinite values.
    """
    if not hasattr(model, "qat_state"):
        raise ValueError(f"This {type(model).__name__} is not in training. Call `prepare_qat()` on it first.")
    refuse_dispatched(model, "convert")
    _refuse_not_finite(model)
    dtype = dtype or model.dtype
    config, plan = model.qat_state.config, model.qat_state.plan
    config.format_version = FORMAT_VERSION
    config.layers = {}
    for name, layer in trainable_layers(model).items():
        config.layers[name] = {"bits": layer.bits, "shape": list(layer.weight.shape)}
        packed = packed_twin(layer, layer.bits, dtype)
        del packed.balance  # a setting of the trainable layer, copied with stride and padding
        codes, scale = layer.codes_and_scale()
        packed.set_codes(pack_dense(codes.to(torch.int8), layer.bits), scale)
        replace_module(model, name, packed)
    config.time_embedding = install_time_features(model, plan)
    _cast_floats(model, dtype)
    del model.qat_state
    quantizer = BitsFusionQuantizer(config, pre_quantized=True)
    quantizer.update_torch_dtype(dtype)
    quantizer.finish(model)
    model.hf_quantizer = quantizer
    model.register_to_config(_pre_quantization_dtype=dtype)
    return model.requires_grad_(False)


def _refuse_not_finite(model: ModelMixin) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"Cannot convert: {name} holds NaN or infinite values.")


def _cast_floats(model: ModelMixin, dtype: torch.dtype) -> None:
    """Cast what `from_pretrained(dtype=...)` would: floating parameters but those that the model keeps in fp32."""
    kept = model._keep_in_fp32_modules or []
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
