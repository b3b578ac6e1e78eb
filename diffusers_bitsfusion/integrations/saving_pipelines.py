"""Methods of `DiffusionPipeline` wrapped for pipelines that hold a quantized model: saving, pushing, `from_pipe`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module

from ..config.bitsfusion import BitsFusionConfig
from ..reporting.model_card import is_users_own, write_card
from ..utils.hooks import refuse_offloaded
from ..utils.hub import explaining_refusals
from ..utils.private_names import TRANSFORMERS_ADAPTER
from .loading import refuse_flashpack
from .save_then_upload import (
    folder_title,
    inside_pipeline,
    replacing_then_uploading,
    save_even_if_refused,
    upload_or_defer,
)
from .saving import QuantizedModelMixin
from .transformers_quantizer import BitsFusionTextQuantizer


def _quantized_models(pipeline: Any) -> list[QuantizedModelMixin]:
    parts = [unwrap_module(part) for part in pipeline.components.values()]  # They may be compiled.
    return [part for part in parts if isinstance(part, QuantizedModelMixin)]


# Flag that `from_pipe` is at work without a dtype: it ends in a cast that nobody asked for.
_keeps_dtypes: ContextVar[bool] = ContextVar("keeps_dtypes", default=False)


def _holds_quantized_model(pipeline: Any) -> bool:
    quantizers = [getattr(component, "hf_quantizer", None) for component in pipeline.components.values()]
    return any(isinstance(getattr(q, "quantization_config", None), BitsFusionConfig) for q in quantizers)


@contextmanager
def _saving_encoders_whole(pipeline: Any) -> Iterator[None]:
    """Have transformers save packed text encoders, as diffusers saves UNets, where it would save their adapters alone.

    The folder of the pipeline would have no text encoder then.
    """
    encoders = [
        part
        for part in pipeline.components.values()
        if isinstance(getattr(part, "hf_quantizer", None), BitsFusionTextQuantizer)
        and TRANSFORMERS_ADAPTER.read(part, False)
    ]
    for encoder in encoders:
        setattr(encoder, TRANSFORMERS_ADAPTER.name, False)
    try:
        yield
    finally:
        for encoder in encoders:
            setattr(encoder, TRANSFORMERS_ADAPTER.name, True)


def wrap_save_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `DiffusionPipeline.save_pretrained`, so that a pipeline with a quantized model saves all or nothing."""

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if not _holds_quantized_model(self):
            return original(self, save_directory, *args, **kwargs)
        if kwargs.get("use_flashpack"):
            refuse_flashpack()
        for part in self.components.values():
            if isinstance(part, torch.nn.Module):
                refuse_offloaded(part)
        title = folder_title(Path(save_directory))
        if kwargs.get("push_to_hub"):
            title = kwargs.setdefault("repo_id", title)
        token = inside_pipeline.set(True)
        try:
            with explaining_refusals(title):
                with replacing_then_uploading(Path(save_directory)) as scratch:
                    save = functools.partial(original, self, str(scratch), *args, **kwargs)
                    with _saving_encoders_whole(self):
                        refusal = save_even_if_refused(save, scratch, bool(kwargs.get("push_to_hub", False)))
                    if not is_users_own(Path(save_directory)):
                        write_card(scratch, self, title=title)
                if refusal is not None:
                    raise refusal
        finally:
            inside_pipeline.reset(token)

    return save_pretrained


def wrap_push_to_hub(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `DiffusionPipeline.push_to_hub`, so that a refusal of the Hub says what to do."""

    @functools.wraps(original)
    def push_to_hub(self: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if not _holds_quantized_model(self):
            return original(self, repo_id, *args, **kwargs)
        with explaining_refusals(repo_id):
            return original(self, repo_id, *args, **kwargs)

    return push_to_hub


def wrap_upload_folder(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `DiffusionPipeline._upload_folder`, so that it uploads the package's card in place of an empty one."""

    @functools.wraps(original)
    def upload_folder(self: Any, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if not _holds_quantized_model(self):
            return original(self, working_dir, repo_id, *args, **kwargs)
        if not is_users_own(Path(working_dir)):
            write_card(Path(working_dir), self, title=repo_id, token=kwargs.get("token"))

        def send(folder: str) -> Any:
            with explaining_refusals(repo_id):
                return original(self, folder, repo_id, *args, **kwargs)

        return upload_or_defer(send, working_dir)

    return upload_folder


def wrap_to(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `DiffusionPipeline.to`, so that what a packed model refuses is refused before another model is changed."""

    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _keeps_dtypes.get():
            return self
        requested = [*args, kwargs.get("device"), kwargs.get("dtype")]
        for model in _quantized_models(self):
            for value in requested:
                if isinstance(value, torch.dtype):
                    model.check_cast(value)
                elif value is not None:
                    model.check_device(value)
        return original(self, *args, **kwargs)

    return to


def wrap_from_pipe(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `DiffusionPipeline.from_pipe`, which casts to fp32 where no dtype is given: every part keeps its own.

    A packed model refuses a cast; and a VAE may be in fp32 beside a denoiser in half precision.
    """

    @functools.wraps(original)
    def from_pipe(cls: type, pipeline: Any, **kwargs: Any) -> Any:
        given = kwargs.get("dtype") or kwargs.get("torch_dtype")
        token = _keeps_dtypes.set(_holds_quantized_model(pipeline) and given is None)
        try:
            return original(cls, pipeline, **kwargs)
        finally:
            _keeps_dtypes.reset(token)

    return from_pipe
