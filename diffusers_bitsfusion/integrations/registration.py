"""Registration of the method in other packages: the only file that changes them, as docs/ARCHITECTURE.md lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline
from diffusers.loaders import FluxLoraLoaderMixin, FromSingleFileMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.pipelines import pipeline_utils
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.utils import logging
from peft import LoraModel
from peft.tuners.glora import GloraModel
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from ..config.bitsfusion import BitsFusionConfig, BitsFusionMethod
from ..utils.private_names import (
    DIFFUSERS_COMPONENT_CHECK,
    DIFFUSERS_EXPAND_LAYERS,
    DIFFUSERS_FIT_LORA,
    DIFFUSERS_UPLOAD,
    PEFT_GLORA,
    PEFT_MERGE,
    PEFT_NEW_MODULE,
    PrivateName,
)
from .control_lora import wrap_expand_layers, wrap_fit_lora, wrap_unload_lora
from .derived_models import register_derived_models
from .diffusers_quantizer import BitsFusionQuantizer
from .loading import wrap_component_check, wrap_from_pretrained, wrap_from_single_file, wrap_load_components
from .parameters import wrap_num_parameters
from .peft_checks import wrap_fuse_lora, wrap_inject_adapter, wrap_merge
from .peft_glora import wrap_create_glora
from .peft_lora import wrap_create_new_module
from .saving_pipelines import wrap_from_pipe, wrap_push_to_hub, wrap_save_pretrained, wrap_to, wrap_upload_folder
from .transformers_quantizer import BitsFusionTextQuantizer

logger = logging.get_logger(__name__)

_METHOD = BitsFusionMethod.BITSFUSION.value


def register() -> None:
    """Register the method with diffusers, transformers and PEFT, once.

    The method enters the tables of diffusers and transformers, pipelines with a packed model save all or nothing, and
    PEFT uses the LoRA layers of this package for packed layers.
    """
    if _METHOD in AUTO_QUANTIZER_MAPPING:
        return
    AUTO_QUANTIZER_MAPPING[_METHOD] = BitsFusionQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = BitsFusionConfig
    register_quantizer(_METHOD)(BitsFusionTextQuantizer)
    register_quantization_config(_METHOD)(BitsFusionConfig)
    DiffusionPipeline.save_pretrained = wrap_save_pretrained(DiffusionPipeline.save_pretrained)
    DiffusionPipeline.push_to_hub = wrap_push_to_hub(DiffusionPipeline.push_to_hub)
    DiffusionPipeline.from_pipe = classmethod(wrap_from_pipe(DiffusionPipeline.from_pipe.__func__))
    DiffusionPipeline.to = wrap_to(DiffusionPipeline.to)
    _register_loading()
    PreTrainedModel.num_parameters = wrap_num_parameters(PreTrainedModel.num_parameters)
    register_derived_models()
    LoraBaseMixin.fuse_lora = wrap_fuse_lora(LoraBaseMixin.fuse_lora)
    BaseTuner.inject_adapter = wrap_inject_adapter(BaseTuner.inject_adapter)
    BaseTuner.merge_adapter = wrap_merge(BaseTuner.merge_adapter)
    for tuner in (BaseTuner, MixedModel):
        _wrap(tuner, PEFT_MERGE, wrap_merge)
    _wrap(DiffusionPipeline, DIFFUSERS_UPLOAD, wrap_upload_folder)
    _wrap(LoraModel, PEFT_NEW_MODULE, lambda original: staticmethod(wrap_create_new_module(original)))
    _wrap(GloraModel, PEFT_GLORA, lambda original: staticmethod(wrap_create_glora(original)))


def _register_loading() -> None:
    ModelMixin.from_pretrained = classmethod(wrap_from_pretrained(ModelMixin.from_pretrained.__func__))
    FromSingleFileMixin.from_single_file = classmethod(
        wrap_from_single_file(FromSingleFileMixin.from_single_file.__func__)
    )
    ModularPipeline.load_components = wrap_load_components(ModularPipeline.load_components)
    _wrap(pipeline_utils, DIFFUSERS_COMPONENT_CHECK, wrap_component_check)
    flux = FluxLoraLoaderMixin
    _wrap(flux, DIFFUSERS_EXPAND_LAYERS, lambda method: classmethod(wrap_expand_layers(method.__func__)))
    _wrap(flux, DIFFUSERS_FIT_LORA, lambda method: classmethod(wrap_fit_lora(method.__func__)))
    flux.unload_lora_weights = wrap_unload_lora(flux.unload_lora_weights)


def _wrap(owner: Any, private: PrivateName, wrapper: Callable[[Any], Any]) -> None:
    """Replace a private method of `owner` by `wrapper(method)`; where it is gone, warn of what will not work."""
    original = private.read(owner)
    if original is None:
        logger.warning(private.missing())
        return
    setattr(owner, private.name, wrapper(original))
