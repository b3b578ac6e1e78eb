"""Methods of diffusers that load, wrapped: components are taken by name, and nothing loads past the quantizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from diffusers import PipelineQuantizationConfig

from ..codec.weight_files import read_index
from ..config.bitsfusion import BitsFusionConfig
from ..utils.errors import DamagedFileError
from ..utils.json_files import MAX_MODEL_BYTES, read_json
from .derived_models import is_packed

# Arguments of `from_pretrained` that say where a model's config is.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# What config.json of a packed model has in it, however damaged.
_METHOD = b"bitsfusion"


def _named_components(config: Any) -> list[str]:
    """Return the components that a pipeline's config names for this method."""
    if isinstance(config, BitsFusionConfig):
        return config.components_to_quantize or []
    if not isinstance(config, PipelineQuantizationConfig):
        return []
    if config.quant_mapping is not None:
        return [name for name, part in config.quant_mapping.items() if isinstance(part, BitsFusionConfig)]
    is_ours = config.quant_backend == BitsFusionConfig.quant_method.value
    return list(config.components_to_quantize or []) if is_ours else []


def check_components(config: Any, present: Iterable[str]) -> None:
    """Refuse to leave out in silence a component that is to be quantized.

    Args:
        config: as `DiffusionPipeline.from_pretrained` takes it.
        present: names of the pipeline's components.

    Raises:
        ValueError: the config names a component that the pipeline lacks; or the pipeline has none of the default ones.
    """
    present = sorted(present)
    missing = [name for name in _named_components(config) if name not in present]
    if missing:
        raise ValueError(
            f"The pipeline has no component {', '.join(missing)} to quantize; it has {', '.join(present)}."
        )
    if isinstance(config, BitsFusionConfig) and not set(config.components) & set(present):
        raise ValueError(f"The pipeline has none of the components {config.components} to quantize; name its own.")


def wrap_component_check(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap what warns of components in a quantization config that the pipeline lacks, so that it refuses them."""

    @functools.wraps(original)
    def check(pipe_init_dict: dict[str, Any], quant_config: Any) -> None:
        check_components(quant_config, pipe_init_dict)
        original(pipe_init_dict, quant_config)

    return check


def wrap_from_single_file(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `from_single_file` of pipelines, which hands the config to the models of diffusers alone."""

    @functools.wraps(original)
    def from_single_file(cls: type, *args: Any, **kwargs: Any) -> Any:
        pipeline = original(cls, *args, **kwargs)
        config = kwargs.get("quantization_config")
        if isinstance(config, BitsFusionConfig):
            check_components(config, [name for name, part in pipeline.components.items() if part is not None])
            left = [
                name
                for name in _named_components(config)
                if not getattr(pipeline.components[name], "is_quantized", False)
            ]
            if left:
                raise ValueError(
                    f"from_single_file does not quantize {', '.join(left)}. Load the pipeline without "
                    "quantization_config, then call quantize_model(pipeline, config)."
                )
        return pipeline

    return from_single_file


def wrap_load_components(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `ModularPipeline.load_components`, which hands one config to every model, so that it takes components."""

    @functools.wraps(original)
    def load_components(self: Any, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("quantization_config")
        if isinstance(config, BitsFusionConfig):
            check_components(config, self.component_names)
            kwargs["quantization_config"] = dict.fromkeys(config.components, config)
        original(self, *args, **kwargs)

    return load_components


def wrap_from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `ModelMixin.from_pretrained`, so that it names damaged JSON and refuses FlashPack, past the quantizer."""

    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        if kwargs.get("use_flashpack"):
            where = {key: kwargs[key] for key in _WHERE if key in kwargs}
            stored = cls.load_config(pretrained_model_name_or_path, **where).get("quantization_config")
            if any(is_packed(config) for config in (kwargs.get("quantization_config"), stored)):
                refuse_flashpack()
        if pretrained_model_name_or_path is not None:
            _check_documents(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        return original(cls, pretrained_model_name_or_path, **kwargs)

    return from_pretrained


def _check_documents(folder: Path) -> None:
    """Refuse a packed model whose config.json or index is damaged, of which diffusers may raise any error.

    Raises:
        DamagedFileError: one of them is.
    """
    config = folder / "config.json"
    if config.is_file() and _METHOD in config.read_bytes():
        content = read_json(config, non_finite=True, max_bytes=MAX_MODEL_BYTES)
        if not isinstance(content.get("quantization_config", {}), dict):
            raise DamagedFileError(config, "is damaged: quantization_config must be an object")
        for index in sorted(folder.glob("*.safetensors.index.json")):
            read_index(index)


def refuse_flashpack() -> None:
    """Refuse to load or save by FlashPack.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "FlashPack casts every tensor of a model to one dtype, the codes of packed layers too. Leave out "
        "`use_flashpack=True`: quantized models are saved and loaded as safetensors."
    )
