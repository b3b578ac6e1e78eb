"""`BitsFusionTextQuantizer`: the hooks that transformers calls while it loads and saves a text encoder."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer

from ..codec.checksums import checksums_metadata, verify_files
from ..codec.state_dict import decode_state_dict, encode_state_dict
from ..codec.values import check_file_values
from ..codec.weight_files import packed_files
from ..config.bitsfusion import BitsFusionConfig
from ..nn.conversion import float_from_packed, replace_module
from ..nn.packed import PackedWeight
from ..packing.file_budget import make_fitting_plan
from ..packing.packer import ModelPacker, install_packed_layers, raise_missing
from ..packing.planning import matches
from ..utils.hooks import refuse_dispatched, refuse_offloaded
from ..utils.private_names import (
    TORCH_BUFFERS,
    TRANSFORMERS_ADAPTER,
    TRANSFORMERS_FP32,
    TRANSFORMERS_FP32_STRICT,
    TRANSFORMERS_INIT,
    TRANSFORMERS_INITIALIZED,
)
from .finish import finish
from .peft_lora import prepare_saving


class BitsFusionTextQuantizer(HfQuantizer):
    """Quantizer that packs a transformers model (CLIP, T5) after it has loaded, or loads and saves a packed one.

    Linear layers are packed; embeddings and weights tied to them are not. Layers that transformers keeps in fp32 in
    an fp16 model (the last feed-forward one of T5) are packed as well, and still compute in fp32.
    """

    quantization_config: BitsFusionConfig

    def __init__(self, quantization_config: BitsFusionConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtype = torch.float32

    # Before loading.

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse, when transformers checks the environment, to spread a text encoder before its weights are decoded.

        Raises:
            ValueError: the device map names several devices, or the disk.
        """
        devices = set(device_map.values()) if isinstance(device_map, dict) else set()
        if len(devices) > 1 or "disk" in devices:
            raise ValueError(
                "A packed text encoder loads onto one device only; offload it afterwards "
                "(`pipe.enable_model_cpu_offload()` or `enable_group_offload`)."
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the dtype that transformers loads in, and keep it."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        install_packed_layers(
            model, self.quantization_config.schema, lambda name: _weight_dtype(model, name, self._dtype)
        )
        if files := packed_files(kwargs.get("checkpoint_files")):
            check_file_values(files, self.quantization_config.schema)
            verify_files(files, self.quantization_config.schema)
        # Transformers initialises tensors that a file lacks, and for that reads weights, before the codes are decoded.
        for module in model.modules():
            if any(isinstance(part, PackedWeight) for part in module.modules()):
                setattr(module, TRANSFORMERS_INITIALIZED.name, True)

    # While loading.

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Return whether transformers may load a tensor of another shape: codes and scales, decoded at the end."""
        owner, _, kind = param_name.rpartition(".")
        return (
            self.pre_quantized and kind in ("codes", "scale") and isinstance(model.get_submodule(owner), PackedWeight)
        )

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Return the bytes of an element by which transformers counts the memory of a device map."""
        return param.element_size()

    # After loading.

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            self._decode(model)
        else:
            self.pack(model)

    def _decode(self, model: PreTrainedModel) -> None:
        schema = self.quantization_config.schema
        packed = {name: model.get_submodule(name) for name in schema.layers}
        loaded = {
            f"{name}.{kind}": tensor
            for name, layer in packed.items()
            for kind, tensor in layer.named_parameters(recurse=False)
            if kind != "bias"
        }
        missing = [name for name, tensor in loaded.items() if not TRANSFORMERS_INITIALIZED.read(tensor, False)]
        if missing:
            raise_missing(model, missing)
        decoded = decode_state_dict(loaded, schema)
        for name, layer in packed.items():
            for kind in ("codes", "scale"):
                tensor = decoded[f"{name}.{kind}"].to(layer.codes.device)
                setattr(layer, kind, nn.Parameter(tensor, requires_grad=False))
        for module in model.modules():
            # No file holds these buffers, and the mark set before loading kept them from being initialised.
            if TORCH_BUFFERS.read(module):
                TRANSFORMERS_INIT.require(model)(module)

    @torch.no_grad()
    def pack(self, model: PreTrainedModel, progress: bool = True) -> None:
        """Quantize a model in memory, in place, and set the attributes that loading sets.

        Args:
            model: model in full precision.
            progress: whether to show a progress bar.

        Raises:
            ValueError: hooks of accelerate or diffusers are on the model; or see `packing.ModelPacker`.
        """
        refuse_dispatched(model, "quantize")
        config = copy.deepcopy(self.quantization_config)
        config.time_embedding = "keep"  # A text encoder has no time embedding.
        config.calibration = None
        tied = [name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair]
        packer = ModelPacker(model, make_fitting_plan(model, config, model.dtype, tied), model.dtype, progress)
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):  # Layers may share a weight.
            if packer.wants(name):
                packer.take(name, parameter, parameter.device)
        for name in packer.plan.bits:
            model.get_submodule(name).weight_dtype = _weight_dtype(model, name, model.dtype)
        finish(model, self, config.resolved(packer.finish()))

    # Saving and undoing.

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what transformers writes into the safetensors files: encoded tensors and their checksums.

        Of a model with an adapter transformers writes the adapter alone, out of the tensors as they are.

        Raises:
            ValueError: the weights are offloaded.
        """
        refuse_offloaded(model)
        if TRANSFORMERS_ADAPTER.read(model, False):
            return model.state_dict(), {}
        prepare_saving(model)
        schema = self.quantization_config.schema
        encoded = encode_state_dict(model.state_dict(), schema)
        return encoded, checksums_metadata(encoded, schema)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        refuse_dispatched(model, "dequantize")
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedWeight):
                replace_module(model, name, float_from_packed(module))
        # Where it is asked for none, transformers gives that of the config; the model keeps its own then.
        if dtype not in (None, model.config.dtype):
            for name, parameter in model.named_parameters():
                if parameter.is_floating_point():
                    kept = _weight_dtype(model, name.rpartition(".")[0], dtype)
                    parameter.data = parameter.data.to(kept)
        return model

    def is_serializable(self) -> bool:
        """Return True: transformers may save the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: PEFT may add adapters to the model."""
        return True


def _weight_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that transformers gives to the weight of a layer in a model of `dtype`."""
    kept = list(TRANSFORMERS_FP32_STRICT.read(model) or []) if dtype in (torch.float16, torch.bfloat16) else []
    if dtype == torch.float16:
        kept += TRANSFORMERS_FP32.read(model) or []
    return torch.float32 if matches(name, kept) else dtype
