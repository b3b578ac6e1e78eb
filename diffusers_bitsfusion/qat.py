"""`prepare_qat` and `convert`: float layers to fake-quantized ones, and those to packed ones (paper, section 6)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import logging

from .calibration.denoising import check_pipeline
from .calibration.layers import CalibratedLayer
from .calibration.run import calibrate
from .codec.radix import pack_dense, unpack_dense
from .config.bitsfusion import BitsFusionConfig
from .config.calibration import Calibration
from .integrations.borrowed_layers import own_layers
from .integrations.diffusers_quantizer import BitsFusionQuantizer
from .integrations.finish import finish
from .nn.conversion import packed_from_float, replace_module
from .nn.fake_quantized import QATConv2d, QATLinear, fake_quantized_from_float
from .ops.dispatch import check_device
from .packing.packer import install_time_features
from .packing.plan import Plan
from .packing.planning import make_plan
from .utils.finite import refuse_not_finite
from .utils.hooks import refuse_dispatched
from .utils.private_names import DIFFUSERS_FP32
from .utils.undo import unchanged_on_error

logger = logging.get_logger(__name__)


@dataclass
class QATState:
    """State of a model in training, its `qat_state`, for `convert`.

    Attributes:
        config: requested config.
        plan: plan of the model by this config.
    """

    config: BitsFusionConfig
    plan: Plan


def qat_layers(model: torch.nn.Module) -> dict[str, QATLinear | QATConv2d]:
    """Return the fake-quantized layers of a model in training, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (QATLinear, QATConv2d))}


def prepare_qat(
    model: ModelMixin | DiffusionPipeline,
    config: BitsFusionConfig | None = None,
    layers: Iterable[str] | None = None,
    calibration: Calibration | Mapping[str, Any] | bool | None = None,
) -> ModelMixin | DiffusionPipeline:
    """Prepare a model for quantization-aware training, in place (paper, section 6).

    Each layer that `quantize_model` would pack becomes a fake-quantized `QATLinear` or `QATConv2d`, an `nn.Linear` or
    `nn.Conv2d` with an fp32 latent `weight` and an fp32 `scale` [out], both requiring gradients, and rounds to the
    same codes and scales as post-training quantization. Weights of other kinds (convolutions in one or three
    dimensions, transposed ones, attention in one module, experts, embeddings) are trained and stay in floating point,
    of which a warning says the share. Everything else stays as it is, time embedding included:
    `convert` replaces that by the look-up that the config requests. Load the model in fp32 and train under autocast;
    `save_pretrained` is refused until `convert`.

    Args:
        model: diffusers model that is not quantized; with `calibration` the pipeline around it, of which the component
            that `config.components` names is prepared (`convert` then expects that component).
        config: as for `quantize_model`; `BitsFusionConfig()` when left out.
        layers: names of the layers to fake-quantize, while the others stay in floating point; all when left out. To
            study one layer alone: `prepare_qat(unet, BitsFusionConfig(recipe=2), layers=["conv_in"])`. The replaced
            layer is not changed, and can be put back.
        calibration: `True`, or the settings of a calibration: training then starts from codes, scales and biases that
            suit the inputs of the layers while the pipeline samples, and each latent weight moves as little as it must
            to round to its code. `config.calibration` when left out.

    Returns:
        The same object.

    Raises:
        TypeError: `config` is no `BitsFusionConfig`.
        ValueError: the model is quantized, prepared or offloaded already, holds NaN or infinite weights, or does not
            suit the config; `layers` names a layer that the config does not quantize; the config asks for integers
            that this machine cannot compute with; calibration is requested, and the object is not a pipeline that
            accepts prompts and has one model to train, or the calibration is to tune, which training does itself; the
            model has no Linear or Conv2d layer.
            After an error or an interruption the model is as it was.
    """
    config = copy.deepcopy(BitsFusionConfig.of(config))
    settings = Calibration.of(config.calibration if calibration is None else calibration)
    if settings is None:
        plan = _plan(model, config, layers)
        with unchanged_on_error(model):
            return _prepare(model, config, plan)
    check_pipeline(model)
    component = _only_component(model, config)
    if settings.tuning_steps:
        raise ValueError("tuning_steps of the calibration tune a packed model; training trains more. Leave them 0.")
    config.calibration = settings.summary()
    plan = _plan(component, config, layers)
    with unchanged_on_error(component):
        calibrated = calibrate(model, component, plan.bits, settings, config.rounding)
        start_calibrated(_prepare(component, config, plan), calibrated)
    return model


@torch.no_grad()
def start_calibrated(model: ModelMixin, calibrated: Mapping[str, CalibratedLayer]) -> None:
    """Set the start of a prepared model to calibrated layers, in place.

    Args:
        model: model that `prepare_qat` has prepared, not trained yet.
        calibrated: layers by name, from `calibrate` with the same bits, grid and weights.
    """
    layers = qat_layers(model)
    for name, start in calibrated.items():
        layer = layers[name]
        codes = unpack_dense(start.codes, layer.bits, layer.weight[0].numel())
        layer.start_from(codes, start.scale, start.bias)


def _only_component(pipeline: DiffusionPipeline, config: BitsFusionConfig) -> ModelMixin:
    """Return the one model that the config names of a pipeline."""
    models = [part for name in config.components if isinstance(part := pipeline.components.get(name), ModelMixin)]
    if len(models) != 1:
        raise ValueError(f"Of {config.components} the pipeline has {len(models)} models to train; name one.")
    return models[0]


def _plan(model: ModelMixin, config: BitsFusionConfig, layers: Iterable[str] | None) -> Plan:
    refuse_dispatched(model, "prepare")
    refuse_not_finite(model, "quantize")
    check_device(config.compute, model.device)  # `convert` would refuse it after the training.
    if config.target_bytes is not None:
        raise ValueError("target_bytes is for quantizing; training keeps the step of its scales. Give target_bits.")
    with own_layers(model):
        plan = make_plan(model, config, DIFFUSERS_FP32.read(model) or [])
    if plan.tensors:
        _say_what_stays(model, plan)
    plan.bits, plan.tensors = plan.layer_bits, {}
    if layers is not None:
        plan.bits = _selected(plan.bits, layers)
    return plan


def _say_what_stays(model: ModelMixin, plan: Plan) -> None:
    """Warn of the parameters that are neither of Linear nor of Conv2d layers, which stay in floating point.

    Raises:
        ValueError: there are no others.
    """
    first = next(iter(plan.tensors.values())).full_parameter
    if not plan.layer_bits:
        raise ValueError(
            f"This {type(model).__name__} has no Linear or Conv2d layer to fake-quantize. Its other weights, such as "
            f"{first}, are packed by `quantize_model`, without training."
        )
    left = sum(place.num_weights for place in plan.tensors.values())
    trained = sum(model.get_submodule(name).weight.numel() for name in plan.layer_bits)
    logger.warning(
        "%.2g %% of the weights of this %s, such as %s, are neither of Linear nor of Conv2d layers: they are trained "
        "in floating point and stay so after `convert()`. `quantize_model` packs them too.",
        100 * left / (left + trained),
        type(model).__name__,
        first,
    )


def _prepare(model: ModelMixin, config: BitsFusionConfig, plan: Plan) -> ModelMixin:
    for name, bits in plan.bits.items():
        try:
            layer = fake_quantized_from_float(model.get_submodule(name), bits, plan.rounding, plan.scale_dtype)
        except ValueError as error:
            raise ValueError(f"Cannot quantize {name}.weight: {error}.") from error
        replace_module(model, name, layer)
    model.qat_state = QATState(config, plan)
    model.save_pretrained = functools.partial(_refuse_to_save, type(model).__name__)
    return model


def end_training(model: ModelMixin) -> None:
    """Take off what `prepare_qat` has put on the model itself; its layers are the caller's to replace."""
    del model.qat_state, model.save_pretrained


def _refuse_to_save(kind: str, *args: Any, **kwargs: Any) -> None:
    """Stand in for `save_pretrained` of a model in training, whose file would load as a plain model, and a worse one.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"This {kind} is in training: saved now it would load as a plain model, without the scales that it has "
        "learned. Save `convert(model)` when it is trained, and its `state_dict()` as a checkpoint."
    )


def _selected(bits: dict[str, int], layers: Iterable[str]) -> dict[str, int]:
    chosen = set(layers)
    unknown = sorted(chosen - set(bits))
    if unknown:
        raise ValueError(f"layers names what the config does not quantize: {', '.join(unknown)}.")
    return {name: count for name, count in bits.items() if name in chosen}


@torch.no_grad()
def convert(model: ModelMixin, dtype: torch.dtype | None = None) -> ModelMixin:
    """Pack a model that `prepare_qat` has prepared, in place, with the codes and scales that it has learned.

    Args:
        model: trained model, unwrapped (`accelerator.unwrap_model`).
        dtype: dtype of the parameters that stay in floating point (biases, norms); the model's own when left out.

    Returns:
        The same object, as `quantize_model` returns it: it can be saved, reloaded, dequantized.

    Raises:
        ValueError: the model was not prepared, is offloaded, or holds NaN or infinite values. After an error or an
            interruption the model is as it was.
    """
    if not hasattr(model, "qat_state"):
        raise ValueError(f"This {type(model).__name__} is not in training. Call `prepare_qat()` on it first.")
    refuse_dispatched(model, "convert")
    refuse_not_finite(model, "convert")
    with unchanged_on_error(model):
        return _convert(model, dtype or model.dtype)


def _convert(model: ModelMixin, dtype: torch.dtype) -> ModelMixin:
    config, plan = model.qat_state.config, model.qat_state.plan
    schema = plan.schema(model)
    for name, layer in qat_layers(model).items():
        packed = packed_from_float(layer, layer.bits, dtype, scale_dtype=layer.scale_dtype)
        codes, scale = layer.codes_and_scale()
        packed.set_codes(pack_dense(codes.to(torch.int8), layer.bits), scale)
        replace_module(model, name, packed)
    schema = schema.with_time_features(install_time_features(model, plan, schema.time_features, dtype))
    _cast_floats(model, dtype)
    end_training(model)
    resolved = config.resolved(schema, config.calibration)
    quantizer = BitsFusionQuantizer(resolved, pre_quantized=True)
    quantizer.trained = True
    finish(model, quantizer, resolved, dtype)
    return model.requires_grad_(False)


def _cast_floats(model: ModelMixin, dtype: torch.dtype) -> None:
    """Cast floating parameters as `from_pretrained(dtype=...)` does, all but those that the model keeps in fp32."""
    kept = DIFFUSERS_FP32.read(model) or []
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
