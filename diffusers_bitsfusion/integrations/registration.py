"""The only file that changes other packages, as listed in docs/ARCHITECTURE.md: they learn of this method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.utils import logging
from peft import LoraModel
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from ..config.bitsfusion import BitsFusionConfig, BitsFusionMethod
from ..utils.private_names import DIFFUSERS_UPLOAD, PEFT_MERGE, PEFT_NEW_MODULE, PrivateName
from .diffusers_quantizer import BitsFusionQuantizer
from .peft_checks import fusing_pipeline, injecting_adapter, merging
from .peft_lora import creating_lora_layer
from .saving import pushing_pipeline, saving_pipeline, switching_pipeline, uploading_pipeline
from .transformers_quantizer import BitsFusionTextQuantizer

logger = logging.get_logger(__name__)

_METHOD = BitsFusionMethod.BITSFUSION.value


def register() -> None:
    """Tell diffusers, transformers and PEFT of this method, once.

    The method enters the tables of diffusers and transformers, pipelines with a packed model save all or nothing, and
    PEFT takes the LoRA layers of this package for packed layers.
    """
    if _METHOD in AUTO_QUANTIZER_MAPPING:
        return
    AUTO_QUANTIZER_MAPPING[_METHOD] = BitsFusionQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = BitsFusionConfig
    register_quantizer(_METHOD)(BitsFusionTextQuantizer)
    register_quantization_config(_METHOD)(BitsFusionConfig)
    DiffusionPipeline.save_pretrained = saving_pipeline(DiffusionPipeline.save_pretrained)
    DiffusionPipeline.push_to_hub = pushing_pipeline(DiffusionPipeline.push_to_hub)
    DiffusionPipeline.from_pipe = classmethod(switching_pipeline(DiffusionPipeline.from_pipe.__func__))
    LoraBaseMixin.fuse_lora = fusing_pipeline(LoraBaseMixin.fuse_lora)
    BaseTuner.inject_adapter = injecting_adapter(BaseTuner.inject_adapter)
    BaseTuner.merge_adapter = merging(BaseTuner.merge_adapter)
    for tuner in (BaseTuner, MixedModel):
        _wrap(tuner, PEFT_MERGE, merging)
    _wrap(DiffusionPipeline, DIFFUSERS_UPLOAD, uploading_pipeline)
    _wrap(LoraModel, PEFT_NEW_MODULE, lambda original: staticmethod(creating_lora_layer(original)))


def _wrap(owner: type, private: PrivateName, wrapper: Callable[[Any], Any]) -> None:
    """Replace a private method of `owner` by what `wrapper` makes of it; where it is gone, say what will be missed."""
    original = private.read(owner)
    if original is None:
        logger.warning(private.missing())
        return
    setattr(owner, private.name, wrapper(original))
