"""Saving that never leaves half a checkpoint: the mixin of quantized models, and the same for whole pipelines."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from ..config.bitsfusion import BitsFusionConfig
from ..nn import PackedWeight, TimeFeatures
from ..nn.compute import packed_layers
from ..nn.packed import refuse_gradients
from ..reporting.model_card import is_users_own, write_card
from ..utils.hooks import refuse_offloaded_to_disk
from ..utils.hub import explaining_refusals
from ..utils.private_names import DIFFUSERS_CONFIG
from ..utils.safetensors_files import sort_metadata
from .folder_commit import private_folder, replacing
from .peft_checks import check_fusable, check_targets
from .peft_lora import prepare_saving

if TYPE_CHECKING:
    from diffusers import ModelMixin as _Base  # which the class that this is mixed into is
else:
    _Base = object

# Whether a pipeline is being saved: its one card replaces those of its models.
_inside_pipeline: ContextVar[bool] = ContextVar("inside_pipeline", default=False)

# Of a save under way, what is to be uploaded when it is complete; None where none is.
_uploads: ContextVar[list[Callable[[str], Any]] | None] = ContextVar("uploads", default=None)

_LINKS = "links"


def parameters_saved(model: Any) -> int:
    """How many more parameters a packed model had in full precision than it has tensor elements now."""
    count = model.hf_quantizer.quantization_config.time_embedding.get("removed_parameters", 0)
    for module in model.modules():
        if isinstance(module, PackedWeight):
            count += torch.Size(module.weight_shape).numel()
        if isinstance(module, (PackedWeight, TimeFeatures)):
            count -= sum(p.numel() for name, p in module.named_parameters(recurse=False) if name != "bias")
    return count


class QuantizedModelMixin(_Base):
    """What a quantized model does otherwise than its class; its name stays that of the class."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As `ModelMixin.save_pretrained`, but all or nothing: on an error the old checkpoint is untouched.

        A push that the Hub refuses leaves the finished save in the folder.

        The arguments are written out because a pipeline's save passes on only those that it finds in the signature.

        Raises:
            ValueError: `safe_serialization=False`; packed models are saved as safetensors only. Or group offloading
                has moved the weights to the disk.
        """
        if not safe_serialization:
            raise ValueError("A quantized model is saved as safetensors only; leave out `safe_serialization=False`.")
        directory = Path(save_directory)
        title = _title(directory)
        if push_to_hub:
            title = kwargs.setdefault("repo_id", title)
        refuse_offloaded_to_disk(self)
        prepare_saving(self)
        # An earlier save left a plain dict there.
        self.register_to_config(quantization_config=self.hf_quantizer.quantization_config)
        inside = _inside_pipeline.get()
        # What a pipeline saves into is itself not in its place yet.
        place = nullcontext(directory) if inside else _replacing_then_uploading(directory)
        with explaining_refusals(title), place as scratch:
            save = functools.partial(
                super().save_pretrained,
                str(scratch),
                is_main_process=is_main_process,
                save_function=save_function,
                variant=variant,
                max_shard_size=max_shard_size,
                **kwargs,
            )
            refusal = _save_even_if_refused(save, scratch, push_to_hub)
            # The others write no config, whose figures a card shows.
            if is_main_process and not inside and not is_users_own(directory):
                write_card(scratch, self, title=title)
        if refusal is not None:
            raise refusal

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' `push_to_hub`; a refusal, by the repository's creation too, says what to do."""
        with explaining_refusals(repo_id):
            return super().push_to_hub(repo_id, *args, **kwargs)

    def _upload_folder(self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """diffusers puts its own card into what it uploads; ours has the figures."""
        if not is_users_own(Path(working_dir)):
            write_card(Path(working_dir), self, title=repo_id, token=kwargs.get("token"))
        upload = super()._upload_folder

        def send(folder: str) -> Any:
            with explaining_refusals(repo_id):
                return upload(folder, repo_id, *args, **kwargs)

        return _upload(send, working_dir)

    @property
    def dtype(self) -> torch.dtype:
        """As `ModelMixin.dtype`; that of the decoded weights where nothing but packed layers is left."""
        dtype = super().dtype
        return dtype if dtype.is_floating_point else next(iter(packed_layers(self).values())).weight_dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As `ModelMixin.num_parameters`: those of the model in full precision, since a code is no parameter."""
        stored = super().num_parameters(only_trainable, exclude_embeddings)
        return stored if only_trainable else stored + parameters_saved(self)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As `ModelMixin.to`, which refuses dtype None (`save_lora_adapter`) and the model's own (IP-Adapters) too."""
        if "dtype" in kwargs and kwargs["dtype"] in (None, self.dtype):
            del kwargs["dtype"]
        return super().to(*(None if argument is self.dtype else argument for argument in args), **kwargs)

    def _load_ip_adapter_weights(self, *args: Any, **kwargs: Any) -> None:
        """As that of UNets, which ends by casting the model to its own dtype: only what it put in needs that."""
        super()._load_ip_adapter_weights(*args, **kwargs)
        for added in (self.encoder_hid_proj, *self.attn_processors.values()):
            if isinstance(added, nn.Module):
                added.to(self.dtype)

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """As diffusers' `fuse_lora`, but an adapter that cannot be fused is refused before any other has been.

        Raises:
            ValueError: see `peft_checks.check_fusable`.
        """
        check_fusable(self, adapter_names, safe_fusing)
        super().fuse_lora(lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """As diffusers' `add_adapter`; one that is refused leaves nothing behind, its name included."""
        known = set(getattr(self, "peft_config", ()))
        try:
            super().add_adapter(adapter_config, adapter_name)
        except Exception:
            self._hf_peft_config_loaded = bool(known)
            for name in set(getattr(self, "peft_config", ())) - known:
                del self.peft_config[name]
            raise

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers' `load_lora_adapter`, but tensors for what is not there are refused before anything is done.

        Raises:
            ValueError: see `peft_checks.check_targets`.
        """
        if isinstance(pretrained_model_name_or_path_or_dict, dict):
            prefix = args[0] if args else kwargs.get("prefix", "transformer")
            names = [name.removeprefix(f"{prefix}.") for name in pretrained_model_name_or_path_or_dict]
            check_targets(self, names)
        super().load_lora_adapter(pretrained_model_name_or_path_or_dict, *args, **kwargs)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As `nn.Module.requires_grad_`; refused in words, before anything is changed, where layers are packed.

        Raises:
            RuntimeError: gradients are asked for.
        """
        if requires_grad:
            refuse_gradients(type(self).__name__)
        return super().requires_grad_(False)

    def fuse_qkv_projections(self) -> None:
        """Refused: it would build float layers from the packed ones."""
        raise ValueError(
            "fuse_qkv_projections() cannot join packed layers. Call `dequantize()` first, or do without it."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickles and copies, since a module has no class of this one's name but the plain one."""
        return _empty_quantized, (_plain_class(self),), self.__dict__


class _EqualToPlain(type):
    """Of classes equal to the one that they extend: `from_pipe` takes over no model of another type."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__mro__[2]

    def __hash__(cls) -> int:
        return hash(cls.__mro__[2])


@functools.cache
def _quantized_class(plain: type) -> type:
    # Same name and module: diffusers writes them into config.json and model_index.json.
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return _EqualToPlain(plain.__name__, (QuantizedModelMixin, plain), names)


def _plain_class(model: QuantizedModelMixin) -> type:
    return type(model).__mro__[2]


def _empty_quantized(plain: type) -> Any:
    return object.__new__(_quantized_class(plain))


def as_quantized_model(model: ModelMixin) -> None:
    """Give a model the mixin's behaviour, once."""
    if not isinstance(model, QuantizedModelMixin):
        plain: Any = type(model)
        model.__class__ = _quantized_class(plain)


def as_plain_model(model: ModelMixin) -> None:
    """Take the mixin and the quantization config from a model, so that it saves and loads without this package."""
    config = DIFFUSERS_CONFIG.require(model)
    model.__class__ = _plain_class(model)
    dropped = ("quantization_config", "_pre_quantization_dtype")
    setattr(model, DIFFUSERS_CONFIG.name, FrozenDict({k: v for k, v in config.items() if k not in dropped}))


@contextmanager
def _replacing_then_uploading(directory: Path) -> Iterator[Path]:
    """`folder_commit.replacing`; what the block asks to upload of the scratch folder is uploaded afterwards.

    So a push that fails leaves the finished save.
    """
    uploads: list[Callable[[str], Any]] = []
    token = _uploads.set(uploads)
    try:
        with replacing(directory) as scratch:
            yield scratch
            for file in scratch.rglob("*.safetensors"):
                sort_metadata(file)  # the same bytes each time
            names = [file.relative_to(scratch) for file in scratch.rglob("*") if file.is_file()]
    finally:
        _uploads.reset(token)
    if not uploads:
        return
    with private_folder(directory) as linked:
        for name in names:
            (linked / _LINKS / name).parent.mkdir(parents=True, exist_ok=True)
            _link(directory / name, linked / _LINKS / name)
        for upload in uploads:
            upload(str(linked / _LINKS))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # some file systems have no hard links
        shutil.copyfile(source, target)


def _upload(upload: Callable[[str], Any], folder: str | os.PathLike[str]) -> Any:
    """Upload a folder, now or after the save that it is part of."""
    uploads = _uploads.get()
    if uploads is None:
        return upload(str(folder))
    uploads.append(upload)


def _save_even_if_refused(save: Callable[..., Any], scratch: Path, push_to_hub: bool) -> Exception | None:
    """Call `save(push_to_hub=...)`; where the Hub refuses before anything is written, save without it.

    Returns:
        The Hub's refusal, to be raised when the save is complete; or None.
    """
    try:
        save(push_to_hub=push_to_hub)
    except (OSError, HfHubHTTPError) as error:
        if not push_to_hub or any(scratch.iterdir()):
            raise
        save(push_to_hub=False)
        return error
    return None


def _title(folder: Path) -> str:
    return folder.resolve().name


def _holds_quantized_model(pipeline: Any) -> bool:
    quantizers = [getattr(component, "hf_quantizer", None) for component in pipeline.components.values()]
    return any(isinstance(getattr(q, "quantization_config", None), BitsFusionConfig) for q in quantizers)


def saving_pipeline(original: Callable[..., Any]) -> Callable[..., Any]:
    """`DiffusionPipeline.save_pretrained` for pipelines that hold a quantized model; others go through `original`."""

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if not _holds_quantized_model(self):
            return original(self, save_directory, *args, **kwargs)
        title = _title(Path(save_directory))
        if kwargs.get("push_to_hub"):
            title = kwargs.setdefault("repo_id", title)
        token = _inside_pipeline.set(True)
        try:
            with explaining_refusals(title), _replacing_then_uploading(Path(save_directory)) as scratch:
                save = functools.partial(original, self, str(scratch), *args, **kwargs)
                refusal = _save_even_if_refused(save, scratch, bool(kwargs.get("push_to_hub", False)))
                if not is_users_own(Path(save_directory)):
                    write_card(scratch, self, title=title)
        finally:
            _inside_pipeline.reset(token)
        if refusal is not None:
            raise refusal

    return save_pretrained


def pushing_pipeline(original: Callable[..., Any]) -> Callable[..., Any]:
    """`DiffusionPipeline.push_to_hub` whose refusals say what to do, for pipelines that hold a quantized model."""

    @functools.wraps(original)
    def push_to_hub(self: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if not _holds_quantized_model(self):
            return original(self, repo_id, *args, **kwargs)
        with explaining_refusals(repo_id):
            return original(self, repo_id, *args, **kwargs)

    return push_to_hub


def uploading_pipeline(original: Callable[..., Any]) -> Callable[..., Any]:
    """`DiffusionPipeline._upload_folder` with our card, for pipelines that hold a quantized model."""

    @functools.wraps(original)
    def upload_folder(self: Any, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if not _holds_quantized_model(self):
            return original(self, working_dir, repo_id, *args, **kwargs)
        if not is_users_own(Path(working_dir)):
            write_card(Path(working_dir), self, title=repo_id, token=kwargs.get("token"))

        def send(folder: str) -> Any:
            with explaining_refusals(repo_id):
                return original(self, folder, repo_id, *args, **kwargs)

        return _upload(send, working_dir)

    return upload_folder


def switching_pipeline(original: Callable[..., Any]) -> Callable[..., Any]:
    """`DiffusionPipeline.from_pipe`, which casts to fp32 unless told otherwise: not what a quantized model can be."""

    @functools.wraps(original)
    def from_pipe(cls: type, pipeline: Any, **kwargs: Any) -> Any:
        if _holds_quantized_model(pipeline) and not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = pipeline.dtype
        return original(cls, pipeline, **kwargs)

    return from_pipe
