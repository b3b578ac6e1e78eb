"""Mixin of quantized models: they save all or nothing, and refuse what packed layers cannot do."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.utils import logging
from torch import Tensor, nn

from ..nn.compute import packed_layers
from ..nn.packed import refuse_gradients
from ..nn.packed_tensor import packed_tensors
from ..ops.dispatch import check_device
from ..reporting.model_card import is_users_own, write_card
from ..utils.hooks import refuse_offloaded
from ..utils.hub import explaining_refusals
from ..utils.private_names import DIFFUSERS_CONFIG
from .control_lora import refuse_expanded
from .derived_models import PACKED_KEYS
from .loading import refuse_flashpack
from .parameters import num_packed_parameters
from .peft_checks import check_fusable, check_targets, read_lora
from .peft_lora import prepare_saving
from .save_then_upload import (
    folder_title,
    inside_pipeline,
    replacing_then_uploading,
    save_even_if_refused,
    upload_or_defer,
)

logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    from diffusers import ModelMixin as _Base  # The class that the mixin is mixed into is one.
else:
    _Base = object


class QuantizedModelMixin(_Base):
    """Behaviour of a quantized model that differs from its class; the name stays that of the class."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as `ModelMixin.save_pretrained`, but all or nothing: on an error the old checkpoint is untouched.

        A push that the Hub refuses leaves the finished save in the folder.

        The arguments are written out because a pipeline's save passes on only those that it finds in the signature.

        Raises:
            HfHubHTTPError: the Hub refuses the push; the message says what to do.
            OSError: the folder cannot be written, or the disk is full.
            ValueError: `safe_serialization` is False or `use_flashpack` True, since packed models are saved as
                safetensors only; the weights are offloaded; or a Control LoRA has replaced layers.
        """
        if use_flashpack:
            refuse_flashpack()
        if not safe_serialization:
            raise ValueError("A quantized model is saved as safetensors only; leave out `safe_serialization=False`.")
        directory = Path(save_directory)
        title = folder_title(directory)
        if push_to_hub:
            title = kwargs.setdefault("repo_id", title)
        refuse_offloaded(self)
        refuse_expanded(self)
        prepare_saving(self)
        # An earlier save left a plain dict in the config.
        self.register_to_config(quantization_config=self.hf_quantizer.quantization_config)
        inside = inside_pipeline.get()
        # The folder that a pipeline saves its models into is replaced with all of the pipeline.
        place = nullcontext(directory) if inside else replacing_then_uploading(directory)
        with explaining_refusals(title):
            with place as scratch:
                save = functools.partial(
                    super().save_pretrained,
                    str(scratch),
                    is_main_process=is_main_process,
                    save_function=save_function,
                    variant=variant,
                    max_shard_size=max_shard_size,
                    **kwargs,
                )
                refusal = save_even_if_refused(save, scratch, push_to_hub)
                # Only the main process writes the config that the card's figures come from.
                if is_main_process and not inside and not is_users_own(directory):
                    write_card(scratch, self, title=title)
            if refusal is not None:
                raise refusal

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Push as diffusers' `push_to_hub`; a refusal, of the repository's creation too, says what to do.

        Raises:
            HfHubHTTPError: the Hub refuses.
        """
        with explaining_refusals(repo_id):
            return super().push_to_hub(repo_id, *args, **kwargs)

    def _upload_folder(self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload with the package's card, which has the figures, in place of diffusers' own."""
        if not is_users_own(Path(working_dir)):
            write_card(Path(working_dir), self, title=repo_id, token=kwargs.get("token"))
        upload = super()._upload_folder

        def send(folder: str) -> Any:
            with explaining_refusals(repo_id):
                return upload(folder, repo_id, *args, **kwargs)

        return upload_or_defer(send, working_dir)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model; that of the decoded weights where all layers are packed."""
        dtype: torch.dtype = get_parameter_dtype(self)  # Dynamo cannot call diffusers' own through super().
        packed: Mapping[str, Any] = packed_layers(self) or packed_tensors(self)
        return dtype if dtype.is_floating_point else next(iter(packed.values())).weight_dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters of the model in full precision, since a code is no parameter."""
        stored: int = super().num_parameters(only_trainable, exclude_embeddings)
        return stored if only_trainable else stored + num_packed_parameters(self)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move as `ModelMixin.to`, but accept dtype None (`save_lora_adapter`) and the model's own (IP-Adapters).

        Raises:
            ValueError: a cast is refused (see `check_cast`) or a device (see `check_device`).
        """
        dtype = next((part for part in args if isinstance(part, torch.dtype)), kwargs.pop("dtype", None))
        if dtype not in (None, self.dtype):
            nn.Module.to(self, dtype=dtype)
        return super().to(*(None if isinstance(part, torch.dtype) else part for part in args), **kwargs)

    def check_cast(self, dtype: torch.dtype) -> None:
        """Refuse a cast, but of an autoencoder that its pipelines cast to fp32 to decode in it, and then back.

        Raises:
            ValueError: the dtype is not the model's own.
        """
        if dtype is not self.dtype and not self.config.get("force_upcast"):
            super().to(dtype=dtype)  # It refuses, as `.half()` and `.float()` do, in diffusers' words.

    def check_device(self, device: torch.device | str | int) -> None:
        """Refuse a device that cannot compute as the layers were told to.

        Raises:
            ValueError: the layers compute in integers, which the device cannot.
        """
        for layer in packed_layers(self).values():
            check_device(layer.compute, torch.device(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The first layers would be moved or cast before.
        after = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.check_cast(after.dtype)
        self.check_device(after.device)
        return super()._apply(fn, recurse)

    def _load_ip_adapter_weights(self, *args: Any, **kwargs: Any) -> None:
        """Load as UNets do, which end by casting the model to its own dtype, and cast the added modules alone."""
        super()._load_ip_adapter_weights(*args, **kwargs)
        for added in (self.encoder_hid_proj, *self.attn_processors.values()):
            if isinstance(added, nn.Module):
                added.to(self.dtype)

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Fuse as diffusers' `fuse_lora`, but refuse an adapter that cannot be fused before any other has been.

        Raises:
            ValueError: see `peft_checks.check_fusable`.
        """
        check_fusable(self, adapter_names, safe_fusing)
        super().fuse_lora(lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Add as diffusers' `add_adapter`; a refused adapter leaves nothing behind, its name included.

        Raises:
            ValueError: PEFT or `peft_checks` refuses the adapter.
        """
        known = set(getattr(self, "peft_config", ()))
        try:
            super().add_adapter(adapter_config, adapter_name)
        except Exception:
            self._hf_peft_config_loaded = bool(known)
            for name in set(getattr(self, "peft_config", ())) - known:
                del self.peft_config[name]
            raise

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """Load as diffusers' `load_lora_adapter`, but refuse tensors of removed layers before anything is changed.

        Raises:
            ValueError: see `peft_checks.check_targets`.
        """
        lora = read_lora(pretrained_model_name_or_path_or_dict, kwargs)
        prefix = args[0] if args else kwargs.get("prefix", "transformer")
        check_targets(self, [name.removeprefix(f"{prefix}.") for name in lora])
        super().load_lora_adapter(lora, *args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """Set the mode as `nn.Module.train`; say, where no adapter is in training, how little would be trained."""
        if mode and not getattr(self, "peft_config", None):
            trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
            if trained:
                logger.warning(
                    f"{type(self).__name__} is packed: of its {self.num_parameters():,} parameters only {trained:,} "
                    "biases and norms can be trained. Add an adapter (`add_adapter`), or train the full-precision "
                    "model by `prepare_qat`."
                )
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze as `nn.Module.requires_grad_`; refuse, before anything is changed, what packed layers cannot do.

        Raises:
            RuntimeError: `requires_grad` is True.
        """
        if requires_grad:
            refuse_gradients(type(self).__name__)
        return super().requires_grad_(False)

    def fuse_qkv_projections(self) -> None:
        """Refuse to join projections: float layers would be built from the packed ones.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "fuse_qkv_projections() cannot join packed layers. Call `dequantize()` first, or do without it."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what pickles and copies need, since the module has only the plain class under this class's name."""
        return _empty_quantized, (_plain_class(self),), self.__dict__


class _EqualToPlain(type):
    """Metaclass of classes equal to the class that they extend: `from_pipe` compares the types of models."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__mro__[2]

    def __hash__(cls) -> int:
        return hash(cls.__mro__[2])


@functools.cache
def _quantized_class(plain: type) -> type:
    # The name and the module stay, since diffusers writes them into config.json and model_index.json.
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return _EqualToPlain(plain.__name__, (QuantizedModelMixin, plain), names)


def _plain_class(model: QuantizedModelMixin) -> type:
    return type(model).__mro__[2]


def _empty_quantized(plain: type) -> Any:
    return object.__new__(_quantized_class(plain))


def as_quantized_model(model: ModelMixin) -> None:
    """Add the mixin to the class of a model, once."""
    if not isinstance(model, QuantizedModelMixin):
        plain: Any = type(model)
        model.__class__ = _quantized_class(plain)


def as_plain_model(model: ModelMixin) -> None:
    """Remove the mixin and the quantization config from a model, so that it saves and loads without this package."""
    config = DIFFUSERS_CONFIG.require(model)
    model.__class__ = _plain_class(model)
    setattr(model, DIFFUSERS_CONFIG.name, FrozenDict({k: v for k, v in config.items() if k not in PACKED_KEYS}))
