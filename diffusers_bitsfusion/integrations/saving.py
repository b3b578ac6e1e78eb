"""Saving that never leaves half a checkpoint: the mixin of quantized models, and the same for whole pipelines."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from torch import nn

from ..codec.weight_files import stem
from ..config.bitsfusion import BitsFusionConfig
from ..reporting.model_card import is_users_own, write_card
from ..utils.hooks import refuse_offloaded_to_disk
from ..utils.hub import explaining_refusals
from .peft_lora import check_fusable, prepare_saving

if TYPE_CHECKING:
    from diffusers import ModelMixin as _Base  # which the class that this is mixed into is
else:
    _Base = object

# Whether a pipeline is being saved: its one card replaces those of its models.
_inside_pipeline: ContextVar[bool] = ContextVar("inside_pipeline", default=False)


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
        with explaining_refusals(title), replacing(directory) as scratch:
            super().save_pretrained(
                str(scratch),
                is_main_process=is_main_process,
                save_function=save_function,
                variant=variant,
                max_shard_size=max_shard_size,
                push_to_hub=push_to_hub,
                **kwargs,
            )
            # The others write no config, whose figures a card shows.
            if is_main_process and not _inside_pipeline.get() and not is_users_own(directory):
                write_card(scratch, self, title=title)

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' `push_to_hub`; a refusal, by the repository's creation too, says what to do."""
        with explaining_refusals(repo_id):
            return super().push_to_hub(repo_id, *args, **kwargs)

    def _upload_folder(self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """diffusers puts its own card into what it uploads; ours has the figures."""
        if not is_users_own(Path(working_dir)):
            write_card(Path(working_dir), self, title=repo_id, token=kwargs.get("token"))
        with explaining_refusals(repo_id):
            return super()._upload_folder(working_dir, repo_id, *args, **kwargs)

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
            ValueError: see `lora.check_fusable`.
        """
        check_fusable(self, adapter_names)
        super().fuse_lora(lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)

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
    model.__class__ = _plain_class(model)
    dropped = ("quantization_config", "_pre_quantization_dtype")
    model._internal_dict = FrozenDict({k: v for k, v in model._internal_dict.items() if k not in dropped})


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A scratch folder whose files take the place of those in `directory` if the block ends without an error.

    Files are flushed to the disk, then renamed; weight files of an earlier save that the new one does not have
    (other shards, their index) go.
    """
    directory.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        yield scratch
        files = [file.relative_to(scratch) for file in sorted(scratch.rglob("*")) if file.is_file()]
        for file in files:
            _flush(scratch / file)
        for folder in {file.parent for file in files}:
            (directory / folder).mkdir(parents=True, exist_ok=True)
            new = {file.name for file in files if file.parent == folder}
            stale = _stale_weights(directory / folder, new)
            for name in sorted(new):
                os.replace(scratch / folder / name, directory / folder / name)
            for file in stale:
                file.unlink(missing_ok=True)  # another process may be saving the same
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _title(folder: Path) -> str:
    return folder.resolve().name


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _stale_weights(folder: Path, new: set[str]) -> list[Path]:
    """Weight files in `folder` of the same name stems as the new ones, sharded or not, and their indices."""
    stems = {stem(name) for name in new} - {None}
    return [file for file in folder.iterdir() if file.is_file() and file.name not in new and stem(file.name) in stems]


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
            with explaining_refusals(title), replacing(Path(save_directory)) as scratch:
                original(self, str(scratch), *args, **kwargs)
                if not is_users_own(Path(save_directory)):
                    write_card(scratch, self, title=title)
        finally:
            _inside_pipeline.reset(token)

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
        with explaining_refusals(repo_id):
            return original(self, working_dir, repo_id, *args, **kwargs)

    return upload_folder


def switching_pipeline(original: Callable[..., Any]) -> Callable[..., Any]:
    """`DiffusionPipeline.from_pipe`, which casts to fp32 unless told otherwise: not what a quantized model can be."""

    @functools.wraps(original)
    def from_pipe(cls: type, pipeline: Any, **kwargs: Any) -> Any:
        if _holds_quantized_model(pipeline) and not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = pipeline.dtype
        return original(cls, pipeline, **kwargs)

    return from_pipe
