"""Saving that never leaves half a checkpoint: the mixin of quantized models, and the same for whole pipelines."""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict

from .card import write_card

# Whether a pipeline is being saved: its one card replaces those of its models.
_inside_pipeline: ContextVar[bool] = ContextVar("inside_pipeline", default=False)

_SHARD = re.compile(r"(?P<stem>.+?)-\d{5}-of-\d{5}(?P<end>\.(safetensors|bin))")


class QuantizedModelMixin:
    """What a quantized model does otherwise than its class; its name stays that of the class."""

    config: FrozenDict

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As `ModelMixin.save_pretrained`, but all or nothing: on an error the old checkpoint is untouched.

        Raises:
            ValueError: `safe_serialization=False`; packed models are saved as safetensors only.
        """
        if kwargs.get("safe_serialization") is False:
            raise ValueError("A quantized model is saved as safetensors only; leave out `safe_serialization=False`.")
        with replacing(Path(save_directory)) as scratch:
            super().save_pretrained(scratch, *args, **kwargs)  # type: ignore[misc]
            if not _inside_pipeline.get():
                _write_card(scratch, Path(save_directory), type(self).__name__, self.config.get("_name_or_path"))

    def fuse_qkv_projections(self) -> None:
        """Refused: it would build float layers from the packed ones."""
        raise ValueError(
            "fuse_qkv_projections() cannot join packed layers. Call `dequantize()` first, or do without it."
        )


def _write_card(scratch: Path, directory: Path, kind: str, base_model: str | os.PathLike[str] | None) -> None:
    """A card for what `scratch` holds, unless `directory` has one already: it may be the user's."""
    if not (directory / "README.md").exists():
        write_card(scratch, kind, base_model, title=directory.name)


@functools.cache
def _quantized_class(plain: type) -> type:
    # Same name and module: diffusers writes them into config.json and model_index.json.
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (QuantizedModelMixin, plain), names)


def as_quantized_model(model: ModelMixin) -> None:
    """Give a model the mixin's behaviour, once."""
    if not isinstance(model, QuantizedModelMixin):
        plain: Any = type(model)
        model.__class__ = _quantized_class(plain)


def as_plain_model(model: ModelMixin) -> None:
    """Take the mixin and the quantization config from a model, so that it saves and loads without this package."""
    model.__class__ = type(model).__mro__[2]
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
                file.unlink()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _stale_weights(folder: Path, new: set[str]) -> list[Path]:
    """Weight files in `folder` of the same name stems as the new ones, sharded or not, and their indices."""
    stems = {_stem(name) for name in new} - {None}
    return [file for file in folder.iterdir() if file.is_file() and file.name not in new and _stem(file.name) in stems]


def _stem(name: str) -> str | None:
    """ "diffusion_pytorch_model" of a weight file, a shard or an index; None of other files."""
    if name.endswith(".index.json"):
        return name.removesuffix(".index.json").removesuffix(".safetensors").removesuffix(".bin")
    shard = _SHARD.fullmatch(name)
    if shard:
        return shard["stem"]
    return next((name.removesuffix(end) for end in (".safetensors", ".bin") if name.endswith(end)), None)


def saving_pipeline(original: Callable[..., Any]) -> Callable[..., Any]:
    """`DiffusionPipeline.save_pretrained` for pipelines that hold a quantized model; others go through `original`."""

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(component, QuantizedModelMixin) for component in self.components.values()):
            return original(self, save_directory, *args, **kwargs)
        token = _inside_pipeline.set(True)
        try:
            with replacing(Path(save_directory)) as scratch:
                original(self, str(scratch), *args, **kwargs)
                _write_card(scratch, Path(save_directory), type(self).__name__, self.config.get("_name_or_path"))
        finally:
            _inside_pipeline.reset(token)

    return save_pretrained
