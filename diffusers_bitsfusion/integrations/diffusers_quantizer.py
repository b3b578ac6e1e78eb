"""`BitsFusionQuantizer`: the hooks that diffusers calls while it loads and saves a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import CustomDtype
from diffusers import ModelMixin
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from ..codec.checksums import checksums_metadata, verify_files
from ..codec.state_dict import decode_state_dict, encode_state_dict
from ..codec.time_schema import TimeFeaturesSchema
from ..codec.weight_files import packed_files
from ..config.bitsfusion import BitsFusionConfig
from ..nn.compute import undo_fusions
from ..nn.conversion import float_from_packed, replace_module
from ..nn.packed import PackedWeight
from ..nn.packed_tensor import restore_tensors
from ..nn.time_features import TimeFeatures, TimeFeatureTable
from ..nn.time_path import TimePath, empty_lookup, install, why_not_cacheable
from ..nn.time_restoration import restore
from ..packing.file_budget import make_fitting_plan
from ..packing.packer import ModelPacker, install_packed_layers, raise_missing
from ..utils.hooks import refuse_dispatched
from ..utils.private_names import ACCELERATE_HOOK
from .borrowed_layers import own_layers
from .finish import finish, warn_untrained
from .saving import as_plain_model


class BitsFusionQuantizer(DiffusersQuantizer):
    """Quantizer that packs a model while it loads, or loads and saves a packed one."""

    use_keep_in_fp32_modules = True
    required_packages: ClassVar[list[str]] = ["zstandard"]

    quantization_config: BitsFusionConfig

    def __init__(self, quantization_config: BitsFusionConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtype = torch.float32
        self._packer: ModelPacker | None = None
        self._keep_float = False
        self._files: list[Path] = []
        self._table: TimeFeatureTable | None = None
        # `qat.convert` sets it for the model card; the config of a checkpoint does not hold it.
        self.trained = False

    # Before loading.

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse, when diffusers checks the environment, a device map that would bypass quantizing.

        Raises:
            ValueError: the model is quantized while loading with a device map that puts modules on disk.
        """
        on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
        if on_disk and not self.pre_quantized:
            raise ValueError(
                'A device map with "disk" cannot be used while quantizing: those weights would stay unquantized. '
                "Quantize and save the model first (`bitsfusion quantize SRC DST`), then load the result with it."
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Remember the dtype that diffusers loads in, and keep it."""
        self._dtype = torch_dtype or torch.float32
        return torch_dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """Return the dtype by which diffusers counts the memory of a device map."""
        # Device maps count the integers of packed parameters at their own size; floats will shrink to 2 bits.
        return torch_dtype if self.pre_quantized else CustomDtype.INT2

    def get_cuda_warm_up_factor(self) -> int:
        """Return the divisor by which diffusers sizes the GPU memory that it reserves."""
        # Elements times the load dtype's 2 bytes over this factor: bytes when packed, about 2 bits before.
        return 2 if self.pre_quantized else 16

    def preprocess_model(self, model: ModelMixin, **kwargs: Any) -> Any:
        """Prepare the empty model when diffusers is about to load weights; keep the VAE of a single file in float."""
        # The loader of single-file pipelines passes one config to all their models, and alone passes the tensors here.
        self._keep_float = (
            "state_dict" in kwargs
            and ".autoencoders." in type(model).__module__
            and "vae" not in self.quantization_config.components
        )
        return model if self._keep_float else super().preprocess_model(model, **kwargs)

    def _process_model_before_weight_loading(
        self,
        model: ModelMixin,
        device_map: Any = None,
        keep_in_fp32_modules: list[str] | None = None,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        # `from_single_file` calls every model pre-quantized, so the names of the tensors decide.
        if state_dict is not None:
            self.pre_quantized = any(name.endswith(".codes") for name in state_dict)
        if self.pre_quantized:
            self._prepare_packed(model)
        else:
            if self.quantization_config.calibration is not None:
                raise ValueError(
                    "calibration runs the pipeline in full precision, so it cannot be done while loading. Load "
                    "without quantization_config, then call quantize_model(pipeline, config)."
                )
            exclude = [name for name in keep_in_fp32_modules or [] if name is not None]
            self._packer = ModelPacker(
                model, make_fitting_plan(model, self.quantization_config, self._dtype, exclude), self._dtype
            )

    def _prepare_packed(self, model: ModelMixin) -> None:
        """Install in the meta model the layers that the checkpoint describes.

        Raises:
            DamagedFileError: a checksum does not match.
            ValueError: the config of the checkpoint does not match the model.
        """
        schema = self.quantization_config.schema
        install_packed_layers(model, schema, lambda name: self._dtype)
        self._prepare_time_features(model, schema.time_features)
        if self._files:
            verify_files(self._files, schema)

    def _prepare_time_features(self, model: ModelMixin, time: TimeFeaturesSchema) -> None:
        if time.kind == "keep":
            return
        path = TimePath.find(model)
        if path is None or tuple(path.sizes) != time.features:
            raise ValueError(
                f"The checkpoint's time features do not fit {type(model).__name__}: "
                f"{why_not_cacheable(model) or 'its blocks have other sizes'}."
            )
        if time.embedding_width not in (0, path.embedding_width):
            raise ValueError(
                f"The checkpoint's time embedding has a width of {time.embedding_width}; {type(model).__name__} has "
                f"{path.embedding_width}."
            )
        with torch.device("meta"):
            lookup = empty_lookup(time)
        install(model, lookup, path.sizes, self._dtype)
        self._table = lookup if isinstance(lookup, TimeFeatureTable) else None

    # While loading.

    @property
    def supports_parallel_loading(self) -> bool:
        """True unless quantizing: threads would then replace the same layers at once."""
        return self.pre_quantized

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember the files that diffusers is about to load, for their checksums.

        Raises:
            DamagedFileError: a packed model is in files of another kind, which have no checksums.
        """
        self._files = packed_files(checkpoint_files) if self.pre_quantized else []
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Decode the tensors of a file when diffusers has read it."""
        if self._keep_float or not self.pre_quantized or not self.quantization_config.is_resolved:
            return state_dict
        decoded = decode_state_dict(state_dict, self.quantization_config.schema)
        if self._table is not None:
            self._table.expect(decoded, "time_proj.")
        return decoded

    def update_missing_keys(self, model: ModelMixin, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse an incomplete checkpoint when diffusers has compared its keys with the model's.

        Raises:
            ValueError: tensors are missing.
        """
        if missing_keys and not self._keep_float:
            raise_missing(model, missing_keys)
        return missing_keys

    def check_if_quantized_param(
        self, model: ModelMixin, param_value: Tensor, param_name: str, *args: Any, **kw: Any
    ) -> bool:
        """Return whether diffusers passes this parameter to `create_quantized_param`."""
        return self._packer is not None and self._packer.wants(param_name)

    def check_quantized_param_shape(self, param_name: str, current_param: Any, loaded_param: Any) -> bool:
        """Compare the shapes of a parameter that diffusers is about to quantize.

        Raises:
            ValueError: the checkpoint and the model have different shapes.
        """
        if tuple(current_param) != tuple(loaded_param.shape):
            raise ValueError(
                f"{param_name} has shape {tuple(loaded_param.shape)} in the checkpoint, the model needs "
                f"{tuple(current_param)}."
            )
        return True

    def create_quantized_param(
        self,
        model: ModelMixin,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str | int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Pack the weight that diffusers has loaded and remove the float one."""
        assert self._packer is not None
        self._packer.take(param_name, param_value, target_device)

    # After loading.

    def postprocess_model(self, model: ModelMixin, **kwargs: Any) -> Any:
        """Finish the model when diffusers has loaded all weights."""
        return model if self._keep_float else super().postprocess_model(model, **kwargs)

    def _process_model_after_weight_loading(self, model: ModelMixin, **kwargs: Any) -> ModelMixin:
        missing = [name for name, module in _modules_with_missing_weights(model)]
        if missing:
            raise_missing(model, missing)
        config = self.quantization_config
        self._table = None
        if self._packer is not None:
            config = self.quantization_config.resolved(self._packer.finish())
            self._packer = None
            warn_untrained(model, config)
        finish(model, self, config)
        return model

    # Saving and undoing.

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what diffusers writes into the safetensors files: encoded tensors and their checksums."""
        if self._keep_float:
            return state_dict, {}
        schema = self.quantization_config.schema
        encoded = encode_state_dict(state_dict, schema)
        return encoded, checksums_metadata(encoded, schema)

    def _dequantize(self, model: ModelMixin) -> ModelMixin:
        refuse_dispatched(model, "dequantize")
        with own_layers(model):
            return self._put_back(model)

    def _put_back(self, model: ModelMixin) -> ModelMixin:
        packed = [(name, m) for name, m in model.named_modules() if isinstance(m, PackedWeight)]
        dtype = packed[-1][1].weight_dtype if packed else self._dtype
        if isinstance(getattr(model, "time_proj", None), TimeFeatures):
            restore(model, dtype)  # It comes first, since it may refuse, and then nothing has changed.
        for name, module in packed:
            replace_module(model, name, float_from_packed(module))
        restore_tensors(model)
        undo_fusions(model)
        as_plain_model(model)
        del model.quantization_method
        return model

    @property
    def is_serializable(self) -> bool:
        """True: diffusers may save the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: PEFT may add adapters to the model."""
        return True


def _modules_with_missing_weights(model: ModelMixin) -> list[tuple[str, nn.Module]]:
    """Return the modules with parameters on the meta device that no offloading hook will load, with their names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)) and not _is_offloaded(module)
    ]


def _is_offloaded(module: nn.Module) -> bool:
    hook = ACCELERATE_HOOK.read(module)
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", [hook]))
