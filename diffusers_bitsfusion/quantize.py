"""`quantize_model`: quantization of a model in memory, with the result of quantizing while loading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.utils.torch_utils import is_compiled_module
from transformers import PreTrainedModel

from .calibration.calls import Call
from .calibration.denoising import check_pipeline
from .calibration.layers import CalibratedLayer
from .calibration.run import calibrate, record_calls, tune_packed
from .config.bitsfusion import BitsFusionConfig
from .config.calibration import Calibration
from .integrations.borrowed_layers import own_layers
from .integrations.diffusers_quantizer import BitsFusionQuantizer
from .integrations.finish import finish, warn_untrained
from .integrations.transformers_quantizer import BitsFusionTextQuantizer
from .ops.dispatch import check_device
from .packing.file_budget import make_fitting_plan
from .packing.packer import ModelPacker
from .packing.planning import check_excluded
from .utils.finite import refuse_not_finite
from .utils.hooks import refuse_dispatched
from .utils.private_names import DIFFUSERS_FP32
from .utils.undo import unchanged_on_error


@torch.no_grad()
def quantize_model(
    model: ModelMixin | PreTrainedModel | DiffusionPipeline,
    config: BitsFusionConfig | None = None,
    progress: bool = True,
    calibration: Calibration | bool | dict[str, Any] | None = None,
) -> ModelMixin | PreTrainedModel | DiffusionPipeline:
    """Quantize a diffusers model, a text encoder or components of a pipeline, in place.

    Args:
        model: model, or pipeline of which the components that `config.components` names are quantized; weights may
            be fp64, fp32, fp16 or bf16, on any device.
        config: config of the quantization; `BitsFusionConfig()` when left out.
        progress: whether to show progress bars.
        calibration: `True`, or the settings of a calibration: the pipeline first runs on prompts, and weights are
            rounded for the inputs of its layers. `config.calibration` when left out. Text encoders are rounded
            without it.

    Returns:
        The same object.

    Raises:
        TypeError: `config` is no `BitsFusionConfig`.
        ValueError: the model is quantized already, compiled or offloaded, holds NaN or infinite weights, or does not
            suit the config; the config asks for integers that this machine cannot compute with; or calibration is
            requested, and the object is not a pipeline that accepts prompts. After an error or an interruption all
            models are as they were.
    """
    config = BitsFusionConfig.of(config)
    settings = Calibration.of(config.calibration if calibration is None else calibration)
    if settings is not None:
        check_pipeline(model, tunes=settings.tuning_steps > 0)
    parts = _requested_components(model, config) if isinstance(model, DiffusionPipeline) else {"this": model}
    for name, part in parts.items():
        _check_kind(part, name)
        _check_values(part, config)
    if len(parts) > 1:
        check_excluded(list(parts.values()), config)
    with unchanged_on_error(*parts.values()):
        for name, part in parts.items():
            _quantize(part, config, progress, model, _for_component(settings, name))
    return model


def _requested_components(pipeline: DiffusionPipeline, config: BitsFusionConfig) -> dict[str, Any]:
    """Return the components to quantize by name; the default names are alternatives, others must all be there.

    Raises:
        ValueError: the pipeline lacks a component that was asked for.
    """
    found = {name: part for name in config.components if (part := pipeline.components.get(name)) is not None}
    missing = [name for name in config.components_to_quantize or [] if name not in found]
    if not found:
        raise ValueError(f"The pipeline has none of the components {config.components} to quantize.")
    if missing:
        modules = [name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]
        raise ValueError(
            f"This {type(pipeline).__name__} has no component {', '.join(missing)} to quantize; "
            f"it has {', '.join(modules)}."
        )
    return found


def _quantize(
    model: ModelMixin | PreTrainedModel,
    config: BitsFusionConfig,
    progress: bool,
    pipeline: DiffusionPipeline,
    calibration: Calibration | None,
) -> None:
    """Quantize one model, by the runs of its pipeline where it is calibrated."""
    if isinstance(model, PreTrainedModel):
        BitsFusionTextQuantizer(config, pre_quantized=False).pack(model, progress)
        return
    refuse_dispatched(model, "quantize")
    dtype = model.dtype
    exclude = DIFFUSERS_FP32.read(model) or []
    with own_layers(model):
        plan = make_fitting_plan(model, config, dtype, exclude)
        packer = ModelPacker(model, plan, dtype, progress)
    calibrated: dict[str, CalibratedLayer] = {}
    calls: list[Call] = []
    timesteps = plan.timesteps if plan.time_embedding == "cache" else None
    if calibration is not None:
        calibrated = calibrate(pipeline, model, plan.layer_bits, calibration, plan.rounding, progress, plan.rates)
        if calibration.tuning_steps:
            calls = record_calls(pipeline, model, calibration, timesteps, progress)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):  # Layers may share a weight.
        layer = name.removesuffix(".weight")
        if layer in calibrated:
            packer.take_calibrated(layer, calibrated[layer], parameter.device)
        elif packer.wants(name):
            packer.take(name, parameter, parameter.device)
    packed = config.resolved(packer.finish(), None if calibration is None else calibration.summary())
    finish(model, BitsFusionQuantizer(packed, pre_quantized=True), packed, dtype)
    warn_untrained(model, packed)
    if calibration is not None and calls:
        tune_packed(model, calls, calibration, timesteps, progress)


def _check_kind(model: Any, name: str) -> None:
    """Refuse an object that is no model with a config, such as several ControlNets in one."""
    if is_compiled_module(model):
        raise ValueError(f"Cannot quantize {name}: it is compiled. Quantize the model first, then compile it.")
    if not isinstance(model, (ConfigMixin, PreTrainedModel)):
        raise ValueError(
            f"Cannot quantize {name}: {type(model).__name__} is no single model of diffusers or transformers. "
            "Quantize its parts by `quantize_model(part)`, each on its own."
        )


def _check_values(model: ModelMixin | PreTrainedModel, config: BitsFusionConfig) -> None:
    """Refuse, before hours of calibration, what would be refused after them.

    Raises:
        ValueError: a parameter holds NaN or infinite values, or the model's device has no integer arithmetic and
            `config.compute` asks for it.
    """
    refuse_not_finite(model, "quantize")
    if isinstance(model, ModelMixin):
        check_device(config.compute, model.device)


def _for_component(calibration: Calibration | None, name: str) -> Calibration | None:
    """Return the calibration with a cache folder of its own for the component `name` of a pipeline."""
    if calibration is None or calibration.cache_dir is None:
        return calibration
    return replace(calibration, cache_dir=Path(calibration.cache_dir) / name)
