"""`quantize_model`: the same as quantizing while loading, on a model already in memory."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, ModelMixin

from .config import BitsFusionConfig
from .packing import ModelPacker, refuse_dispatched
from .quantizer import BitsFusionQuantizer


@torch.no_grad()
def quantize_model(
    model: ModelMixin | DiffusionPipeline, config: BitsFusionConfig | None = None, progress: bool = True
) -> ModelMixin | DiffusionPipeline:
    """Quantize a diffusers model, or the components of a pipeline that `config.components` names, in place.

    Args:
        model: the model or pipeline; its weights may have any floating dtype and device.
        config: what to do; `BitsFusionConfig()` when left out.
        progress: whether to show a progress bar.

    Returns:
        The same object.

    Raises:
        ValueError: it is quantized already or offloaded, holds NaN or infinite weights, or the config does not suit
            it. A model that failed half way is not usable.
    """
    config = config or BitsFusionConfig()
    if isinstance(model, DiffusionPipeline):
        components = [model.components[name] for name in config.components if name in model.components]
        if not components:
            raise ValueError(f"The pipeline has none of the components {config.components} to quantize.")
        for component in components:
            quantize_model(component, config, progress)
        return model
    refuse_dispatched(model, "quantize")
    dtype = model.dtype
    quantizer = BitsFusionQuantizer(config, pre_quantized=False)
    quantizer.update_torch_dtype(dtype)
    exclude = model._keep_in_fp32_modules or []
    packer = ModelPacker(model, config, dtype, exclude, progress)
    for name, parameter in list(model.named_parameters()):
        if packer.wants(name):
            packer.take(name, parameter, parameter.device)
    quantizer.adopt(packer)
    quantizer.finish(model)
    model.hf_quantizer = quantizer
    model.register_to_config(_pre_quantization_dtype=dtype)
    return model
