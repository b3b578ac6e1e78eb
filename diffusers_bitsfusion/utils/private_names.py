"""Private names of other packages that this package reads, in one guarded place.

A new version of a package may rename them. Importing this package and loading a checkpoint still work then; a feature
that needs the name says what is missing, and tests/utils/test_private_names.py fails with the entry of this table.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PrivateName:
    """Private name of another package.

    Attributes:
        module: module or class of the other package that has the name, or whose text holds it.
        name: name of an attribute.
        feature: feature that needs the attribute, for messages.
    """

    module: str
    name: str
    feature: str

    def read(self, owner: Any, default: Any = None) -> Any:
        """Return the attribute of `owner`, or `default` where the attribute is missing."""
        return getattr(owner, self.name, default)

    def require(self, owner: Any) -> Any:
        """Return the attribute of `owner`.

        Raises:
            RuntimeError: the installed version of the package has no such name.
        """
        try:
            return getattr(owner, self.name)
        except AttributeError as error:
            raise RuntimeError(self.missing()) from error

    def missing(self) -> str:
        """Return the message for a version of the package that lacks the name."""
        package = self.module.partition(".")[0]
        return (
            f"{package} {importlib.metadata.version(package)} has no {self.name} in {self.module}, which "
            f"diffusers_bitsfusion needs for {self.feature}. Use a version of {package} that its pyproject.toml names."
        )


ACCELERATE_HOOK = PrivateName("accelerate.hooks", "_hf_hook", "knowing what accelerate offloads")
DIFFUSERS_HOOK = PrivateName("diffusers.hooks.hooks", "_diffusers_hook", "knowing what diffusers offloads")
DIFFUSERS_CONFIG = PrivateName("diffusers.configuration_utils", "_internal_dict", "dequantize()")
DIFFUSERS_FP32 = PrivateName(
    "diffusers.models.modeling_utils", "_keep_in_fp32_modules", "leaving alone what a model keeps in fp32"
)
DIFFUSERS_UNITS = PrivateName(
    "diffusers.models.modeling_utils", "_no_split_modules", "sharing a model out by its units"
)
DIFFUSERS_UPLOAD = PrivateName("diffusers.utils.hub_utils", "_upload_folder", "the model card of a pushed pipeline")
DIFFUSERS_IP_ADAPTER = PrivateName(
    "diffusers.loaders.unet", "_load_ip_adapter_weights", "IP-Adapters on a packed model"
)
DIFFUSERS_COMPONENT_CHECK = PrivateName(
    "diffusers.pipelines.pipeline_utils",
    "_maybe_warn_for_wrong_component_in_quant_config",
    "refusing to quantize components that a pipeline lacks",
)
DIFFUSERS_EXPAND_LAYERS = PrivateName(
    "diffusers.loaders.lora_pipeline", "_maybe_expand_transformer_param_shape_or_error_", "Control LoRAs of Flux"
)
DIFFUSERS_FIT_LORA = PrivateName("diffusers.loaders.lora_pipeline", "_maybe_expand_lora_state_dict", "LoRAs of Flux")
DIFFUSERS_FETCH_LORA = PrivateName(
    "diffusers.loaders.lora_base", "_fetch_state_dict", "checking a LoRA's file before it is loaded"
)
DIFFUSERS_OVERWRITTEN = PrivateName(
    "diffusers.loaders.lora_pipeline", "_overwritten_params", "putting back what a Control LoRA of Flux replaced"
)
DIFFUSERS_PROGRESS = PrivateName(
    "diffusers.pipelines.pipeline_utils", "_progress_bar_config", "hiding a pipeline's progress bars"
)
DIFFUSERS_CHECKPOINTING = PrivateName(
    "diffusers.ModelMixin", "_supports_gradient_checkpointing", "tuning within memory_gb"
)
TRANSFORMERS_FP32 = PrivateName(
    "transformers.modeling_utils", "_keep_in_fp32_modules", "computing in fp32 what a text encoder keeps in fp32"
)
TRANSFORMERS_FP32_STRICT = PrivateName(
    "transformers.modeling_utils",
    "_keep_in_fp32_modules_strict",
    "computing in fp32 what a text encoder keeps in fp32",
)
TRANSFORMERS_INITIALIZED = PrivateName(
    "transformers.modeling_utils", "_is_hf_initialized", "loading a packed text encoder"
)
TRANSFORMERS_INIT = PrivateName("transformers.modeling_utils", "_init_weights", "buffers of a packed text encoder")
TRANSFORMERS_ADAPTER = PrivateName(
    "transformers.modeling_utils", "_hf_peft_config_loaded", "saving a packed text encoder that has an adapter"
)
PEFT_NEW_MODULE = PrivateName("peft.tuners.lora.model", "_create_new_module", "fusing LoRAs into packed layers")
PEFT_GLORA = PrivateName("peft.tuners.glora.model", "_create_new_module", "GLoRA on packed layers")
PEFT_KASA = PrivateName("peft.tuners.lora.variants", "_lora_kasa_truncation_deferred", "KaSA on packed layers")
PEFT_MERGE = PrivateName(
    "peft.tuners.tuners_utils", "_unload_and_optionally_merge", "refusing to merge what packed layers cannot take"
)
PEFT_TARGETS = PrivateName(
    "peft.tuners.tuners_utils", "_check_target_module_exists", "putting adapters in whole or not at all"
)
PEFT_PREPARE = PrivateName(
    "peft.tuners.tuners_utils", "_prepare_adapter_config", "adapters whose targets PEFT knows by the architecture"
)
PEFT_ADAPTERS = PrivateName(
    "peft.tuners.tuners_utils", "_all_available_adapter_names", "saying which adapters are not saved"
)
TORCH_BUFFERS = PrivateName(
    "torch.nn.modules.module", "_non_persistent_buffers_set", "buffers of a packed text encoder"
)
TORCH_PADDING = PrivateName(
    "torch.nn.modules.conv", "_reversed_padding_repeated_twice", "convolutions with padding of another kind than zeros"
)
TORCH_VNNI = PrivateName("torch.cpu", "_is_vnni_supported", 'compute="int8" on a CPU')
TORCH_INT_MM = PrivateName("torch", "_int_mm", 'compute="int8" on a CPU')
TORCH_ASSERT = PrivateName("torch", "_assert_async", "refusing timesteps that time features lack, on a GPU")
TORCH_WRAPPER = PrivateName("torch.Tensor", "_make_wrapper_subclass", "the weight of a packed layer")
TORCH_NO_OVERRIDE = PrivateName("torch._C", "_disabled_torch_function_impl", "the weight of a packed layer")
TORCH_AMX = PrivateName("torch.cpu", "_is_amx_tile_supported", "attention by bf16 dot products")
TORCH_STORE = PrivateName(
    "torch.distributed.distributed_c10d", "_get_default_store", "telling other processes of an error"
)
TORCH_EXTENSION = PrivateName("torch", "_C", "compiled loops on several threads")
TORCH_FORWARD_LEVEL = PrivateName("torch.autograd.forward_ad", "_current_level", "forward-mode differentiation")
TORCH_TRANSFORMS = PrivateName("torch._C", "_are_functorch_transforms_active", "transforms of torch.func")
TORCH_UNWRAP = PrivateName("torch._C._functorch", "get_unwrapped", "checks of timesteps within torch.func.vmap")
TORCH_WRAPPED = PrivateName(
    "torch._C._functorch", "is_functorch_wrapped_tensor", "checks of timesteps within torch.func.vmap"
)
