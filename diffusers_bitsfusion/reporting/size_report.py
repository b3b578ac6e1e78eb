"""Bits and bytes, counted on the file or on the tensors themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ..codec.checksums import METADATA_KEY
from ..codec.schema import CheckpointSchema
from ..codec.weight_files import index_files, read_headers
from ..config.bitsfusion import BitsFusionConfig
from ..nn.attention import attention_kernels
from ..nn.compute import packed_layers
from ..nn.residual_block import norm_kernels
from ..utils.errors import DamagedFileError, UnfinishedSaveError
from ..utils.json_files import MAX_MODEL_BYTES, read_json
from ..utils.peft_names import split_adapters
from .report_types import PipelineSizeReport, SizeReport, report_of_tensors


def size_report(
    model_or_path: nn.Module | DiffusionPipeline | str | os.PathLike[str],
) -> SizeReport | PipelineSizeReport:
    """Report bytes by part, bits a weight by each convention, the ratio to fp16 and the histogram of bits.

    Args:
        model_or_path: a quantized model in memory, a pipeline that has one, or a folder written by `save_pretrained`,
            of either.

    Raises:
        FileNotFoundError: the folder does not exist or holds no model.
        ValueError: the model is not quantized by this package.
    """
    if isinstance(model_or_path, nn.Module):
        return _memory_report(model_or_path)
    if isinstance(model_or_path, DiffusionPipeline):
        return _pipeline_memory_report(model_or_path)
    path = Path(model_or_path)
    if (path / "config.json").is_file():
        return _file_report(path)
    if (path / "model_index.json").is_file():
        return _pipeline_report(path)
    raise FileNotFoundError(f"{path} holds neither a model (config.json) nor a pipeline (model_index.json).")


def _pipeline_memory_report(pipeline: DiffusionPipeline) -> PipelineSizeReport:
    quantized, others = {}, {}
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, nn.Module) and _quantization_config(part) is not None:
            quantized[name] = _memory_report(part)
        elif isinstance(part, nn.Module):
            others[name] = sum(tensor.nbytes for tensor in part.state_dict().values())
    if not quantized:
        raise ValueError(f"No component of this {type(pipeline).__name__} is quantized by diffusers_bitsfusion.")
    return PipelineSizeReport(quantized, others)


def _quantization_config(model: nn.Module) -> Any:
    """Return the config that quantizing by this package has left on a model in memory, else None."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return config if getattr(config, "is_resolved", False) else None


def _pipeline_report(path: Path) -> PipelineSizeReport:
    quantized, others = {}, {}
    index = _read(path / "model_index.json")
    for folder in sorted(child for child in path.iterdir() if child.is_dir() and child.name in index):
        if is_packed_model(folder):
            quantized[folder.name] = _file_report(folder)
        else:
            others[folder.name] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if not quantized:
        raise ValueError(f"No component of the pipeline in {path} is quantized by diffusers_bitsfusion.")
    return PipelineSizeReport(quantized, others)


def is_packed_model(folder: Path) -> bool:
    """Return whether the config.json in a folder, where there is one, says that this package packed the model.

    Raises:
        DamagedFileError: the config.json cannot be read.
    """
    config = folder / "config.json"
    return config.is_file() and _is_packed(_read(config))


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(file, non_finite=True, max_bytes=MAX_MODEL_BYTES)
    return content


def _is_packed(config: Mapping[str, Any]) -> bool:
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "bitsfusion"


def _file_report(path: Path) -> SizeReport:
    schema = read_schema(path)
    excluded = _read(path / "config.json")["quantization_config"].get("modules_to_not_convert")
    headers = read_headers(path)
    tensors = [
        (name, entry.shape, entry.num_bytes) for header in headers.values() for name, entry in header.tensors.items()
    ]
    overhead = sum(file.stat().st_size for file in headers) - sum(size for _, _, size in tensors)
    overhead += sum(file.stat().st_size for file in [path / "config.json", *index_files(path)])
    report = report_of_tensors("file", tensors, schema, overhead, excluded or ())
    return replace(report, checksums=all(METADATA_KEY in header.metadata for header in headers.values()))


def read_schema(folder: Path) -> CheckpointSchema:
    """Return the schema of a packed file, which the config.json in its folder holds, after every check.

    Raises:
        DamagedFileError: it is damaged.
        UnfinishedSaveError: the save into the folder was killed before its end.
        ValueError: the model is not quantized by this package.
        FileNotFoundError: there is no config.json.
    """
    file = folder / "config.json"
    config = _read(file)
    if not _is_packed(config):
        raise ValueError(f"The model in {folder} is not quantized by diffusers_bitsfusion.")
    try:
        schema: CheckpointSchema = BitsFusionConfig.from_dict(config["quantization_config"]).schema
    except UnfinishedSaveError:
        raise
    except (ValueError, TypeError) as error:
        raise DamagedFileError(f"{file}:", str(error)) from error
    return schema


def _memory_report(model: nn.Module) -> SizeReport:
    config = _quantization_config(model)
    if config is None:
        raise ValueError(f"This {type(model).__name__} is not quantized by diffusers_bitsfusion.")
    plain, adapters = split_adapters(model.state_dict())
    tensors = [(name, tuple(t.shape), t.nbytes) for name, t in plain.items()]
    report = report_of_tensors("memory", tensors, config.schema, 0, config.modules_to_not_convert)
    report.parts["LoRA branches"] += sum(t.nbytes for t in adapters.values())
    layers = {name.replace(".base_layer", ""): layer for name, layer in packed_layers(model).items()}
    kept = [layer.int8_weight for layer in layers.values() if layer.int8_weight is not None]
    report.parts["int8 codes kept for compute"] = sum(weight.numel() for weight in kept)
    report.kernels.update({name: layer.select_kernel() for name, layer in layers.items()})
    report.attention_kernels.update(attention_kernels(model))
    report.norm_kernels.update(norm_kernels(model))
    return report
