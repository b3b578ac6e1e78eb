"""The only file that changes other packages, as listed in docs/ARCHITECTURE.md: they learn of this method."""

from __future__ import annotations

from diffusers import DiffusionPipeline
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from peft import LoraModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from ..config.bitsfusion import BitsFusionConfig, BitsFusionMethod
from .diffusers_quantizer import BitsFusionQuantizer
from .peft_lora import creating_lora_layer
from .saving import pushing_pipeline, saving_pipeline, switching_pipeline, uploading_pipeline
from .transformers_quantizer import BitsFusionTextQuantizer

_METHOD = BitsFusionMethod.BITSFUSION.value


def register() -> None:
    """Enter the method in the tables of diffusers and transformers, make pipelines with a packed model save all or
    nothing, and give PEFT our LoRA layers; once."""
    if _METHOD in AUTO_QUANTIZER_MAPPING:
        return
    AUTO_QUANTIZER_MAPPING[_METHOD] = BitsFusionQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = BitsFusionConfig
    register_quantizer(_METHOD)(BitsFusionTextQuantizer)
    register_quantization_config(_METHOD)(BitsFusionConfig)
    DiffusionPipeline.save_pretrained = saving_pipeline(DiffusionPipeline.save_pretrained)
    DiffusionPipeline.push_to_hub = pushing_pipeline(DiffusionPipeline.push_to_hub)
    DiffusionPipeline._upload_folder = uploading_pipeline(DiffusionPipeline._upload_folder)
    DiffusionPipeline.from_pipe = classmethod(switching_pipeline(DiffusionPipeline.from_pipe.__func__))
    LoraModel._create_new_module = staticmethod(creating_lora_layer(LoraModel._create_new_module))
