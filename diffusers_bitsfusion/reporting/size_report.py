"""Bits and bytes, counted on the file or on the tensors themselves."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..allocation.average_bits import PAPER_TIMESTEPS, AverageBits, average_bits, cached_bits
from ..codec.checksums import METADATA_KEY
from ..codec.grid import levels
from ..codec.schema import CheckpointSchema
from ..codec.weight_files import index_files, read_headers
from ..config.bitsfusion import BitsFusionConfig
from ..nn.attention import attention_ways
from ..nn.compute import packed_layers
from ..ops.dispatch import KernelSelection
from ..utils.adapters import split_adapters
from ..utils.errors import DamagedFileError, UnfinishedSaveError
from ..utils.json_files import read_json

MB = 1e6

# Tables, which are neither Linear nor Conv2d though a file shows no difference.
_EMBEDDINGS = (
    "class_embedding",
    "token_embedding",
    "position_embedding",
    "embed_tokens",
    "shared",
    "relative_attention_bias",
)

# (name, shape, bytes) of a tensor
TensorSize = tuple[str, tuple[int, ...], int]

_PARTS = (
    "packed weights",
    "scales",
    "int8 codes kept for compute",
    "time features",
    "LoRA branches",
    "biases, norms, other tensors",
    "headers and config.json",
)


@dataclass(frozen=True)
class SizeReport:
    """Where the bytes of one quantized model are.

    Attributes:
        where: "file" or "memory".
        parts: bytes by part; LoRA branches are fused LoRAs and, in memory, loaded ones.
        average_bits: by both conventions.
        weights: Linear and Conv2d weights of the original model.
        original_parameters: all parameters of the original model.
        histogram: bits to (layers, weights).
        ways: how each packed layer of a model in memory computes, and why; empty for files.
        attention_ways: the same of its attention, where `set_compute` chose it.
        checksums: whether a file has a checksum of every tensor; None of what is no file.
    """

    where: str
    parts: dict[str, int]
    average_bits: AverageBits
    weights: int
    original_parameters: int
    histogram: dict[int, tuple[int, int]]
    ways: dict[str, KernelSelection] = field(default_factory=dict)
    attention_ways: dict[str, str] = field(default_factory=dict)
    checksums: bool | None = None

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fp16_bytes(self) -> int:
        """Bytes of the original model's parameters in fp16."""
        return 2 * self.original_parameters

    @property
    def ratio(self) -> float:
        """How many times smaller than fp16."""
        return self.fp16_bytes / self.total_bytes

    @property
    def real_bits(self) -> float:
        """All bytes, in bits a weight of the original model."""
        return 8 * self.total_bytes / self.weights

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe content, derived figures included."""
        return {
            "where": self.where,
            "parts": self.parts,
            "total_bytes": self.total_bytes,
            "fp16_bytes": self.fp16_bytes,
            "ratio_to_fp16": self.ratio,
            "bits_per_weight": {
                "paper": self.average_bits.paper,
                "quantized_layers": self.average_bits.layers,
                self.where: self.real_bits,
            },
            "histogram": {bits: {"layers": n, "weights": w} for bits, (n, w) in self.histogram.items()},
            "ways": {name: asdict(way) for name, way in self.ways.items()},
            "attention_ways": self.attention_ways,
            "checksums": self.checksums,
        }

    def __str__(self) -> str:
        packed = sum(weights for _, weights in self.histogram.values())
        lines = [f"{'part':<32}{'MB':>10}"]
        lines += [f"{name:<32}{size / MB:>10.3f}" for name, size in self.parts.items() if size]
        lines += [
            f"{'total in ' + self.where:<32}{self.total_bytes / MB:>10.3f}",
            f"{'original in fp16':<32}{self.fp16_bytes / MB:>10.3f}   {self.ratio:.2f} times smaller",
            "",
            "bits a weight",
            f"  {'paper formula':<30}{self.average_bits.paper:>10.4f}",
            f"  {'over the quantized layers':<30}{self.average_bits.layers:>10.4f}",
            f"  {'real, all of the ' + self.where:<30}{self.real_bits:>10.4f}",
            "",
            f"{'bits':<6}{'levels':>8}{'layers':>8}{'weights':>10}",
        ]
        for bits, (count, weights) in sorted(self.histogram.items()):
            bar = "#" * round(40 * weights / packed)
            lines.append(f"{bits:<6}{levels(bits):>8}{count:>8}{weights / packed:>10.1%}  {bar}")
        if self.ways:
            lines += ["", f"{'layers':>6}  computed"]
        for way, count in Counter(self.ways.values()).most_common():
            lines.append(f"{count:>6}  {way.arithmetic}, weights {way.weights}: {way.reason}")
        for how, count in Counter(self.attention_ways.values()).most_common():
            lines.append(f"{count:>6}  attention {how}")
        if self.checksums is not None:
            lines += ["", f"checksums: {'of every tensor' if self.checksums else 'none, save again to add them'}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class PipelineSizeReport:
    """Bytes of a pipeline: a `SizeReport` for each quantized component, plain bytes for the others."""

    quantized: dict[str, SizeReport]
    others: dict[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        return sum(report.total_bytes for report in self.quantized.values()) + sum(self.others.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe content."""
        parts = {name: report.to_dict() for name, report in self.quantized.items()}
        return {"quantized": parts, "others": self.others, "total_bytes": self.total_bytes}

    def __str__(self) -> str:
        blocks = [f"== {name} ==\n{report}" for name, report in self.quantized.items()]
        sizes = {name: report.total_bytes for name, report in self.quantized.items()} | self.others
        rows = [
            f"{name:<32}{size / MB:>10.3f}" for name, size in (*sizes.items(), ("whole pipeline", self.total_bytes))
        ]
        blocks.append("\n".join(["== components, MB ==", *rows]))
        return "\n\n".join(blocks)


def size_report(
    model_or_path: nn.Module | DiffusionPipeline | str | os.PathLike[str],
) -> SizeReport | PipelineSizeReport:
    """Bytes by part, bits a weight by each convention, ratio to fp16 and histogram of bits.

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
    """The config that quantizing by this package has left on a model in memory, else None."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return config if getattr(config, "is_resolved", False) else None


def _pipeline_report(path: Path) -> PipelineSizeReport:
    quantized, others = {}, {}
    index = read_json(path / "model_index.json", non_finite=True)
    for folder in sorted(child for child in path.iterdir() if child.is_dir() and child.name in index):
        if is_packed_model(folder):
            quantized[folder.name] = _file_report(folder)
        else:
            others[folder.name] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if not quantized:
        raise ValueError(f"No component of the pipeline in {path} is quantized by diffusers_bitsfusion.")
    return PipelineSizeReport(quantized, others)


def is_packed_model(folder: Path) -> bool:
    """Whether the config.json in a folder, where there is one, says that this package packed the model.

    Raises:
        DamagedFileError: the config.json cannot be read.
    """
    config = folder / "config.json"
    return config.is_file() and _is_ours(read_json(config, non_finite=True))


def _is_ours(config: Mapping[str, Any]) -> bool:
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "bitsfusion"


def _file_report(path: Path) -> SizeReport:
    schema = read_schema(path)
    headers = read_headers(path)
    tensors = [
        (name, entry.shape, entry.num_bytes) for header in headers.values() for name, entry in header.tensors.items()
    ]
    overhead = sum(file.stat().st_size for file in headers) - sum(size for _, _, size in tensors)
    overhead += sum(file.stat().st_size for file in [path / "config.json", *index_files(path)])
    report = report_of_tensors("file", tensors, schema, overhead)
    return replace(report, checksums=all(METADATA_KEY in header.metadata for header in headers.values()))


def read_schema(folder: Path) -> CheckpointSchema:
    """What the config.json of a packed model's folder says of its file, after every check.

    Raises:
        DamagedFileError: it is damaged.
        UnfinishedSaveError: the save into the folder was killed before its end.
        ValueError: the model is not quantized by this package.
        FileNotFoundError: there is no config.json.
    """
    file = folder / "config.json"
    config = read_json(file, non_finite=True)
    if not _is_ours(config):
        raise ValueError(f"The model in {folder} is not quantized by diffusers_bitsfusion.")
    try:
        return BitsFusionConfig.from_dict(config["quantization_config"]).schema
    except UnfinishedSaveError:
        raise
    except (ValueError, TypeError) as error:
        raise DamagedFileError(f"{file}:", str(error)) from error


def _memory_report(model: nn.Module) -> SizeReport:
    config = _quantization_config(model)
    if config is None:
        raise ValueError(f"This {type(model).__name__} is not quantized by diffusers_bitsfusion.")
    plain, adapters = split_adapters(model.state_dict())
    tensors = [(name, tuple(t.shape), t.nbytes) for name, t in plain.items()]
    report = report_of_tensors("memory", tensors, config.schema, 0)
    report.parts["LoRA branches"] += sum(t.nbytes for t in adapters.values())
    layers = {name.replace(".base_layer", ""): layer for name, layer in packed_layers(model).items()}
    kept = [layer.int8_weight for layer in layers.values() if layer.int8_weight is not None]
    report.parts["int8 codes kept for compute"] = sum(weight.numel() for weight in kept)
    report.ways.update({name: layer.way() for name, layer in layers.items()})
    report.attention_ways.update(attention_ways(model))
    return report


def report_of_tensors(
    where: str, tensors: Iterable[TensorSize], schema: CheckpointSchema, overhead: int
) -> SizeReport:
    """The report of a model from its tensors' names and sizes.

    Args:
        where: "file", "memory" or the like, for the reader.
        tensors: of the packed model.
        schema: what the checkpoint holds.
        overhead: bytes that belong to no tensor.
    """
    layers = {name: (layer.bits, layer.num_weights) for name, layer in schema.layers.items()}
    parts = dict.fromkeys(_PARTS, 0)
    other_parameters = other_weights = 0
    for name, shape, size in tensors:
        owner, _, kind = name.rpartition(".")
        if owner in layers and kind in ("codes", "scale"):
            parts["packed weights" if kind == "codes" else "scales"] += size
        elif owner in layers and kind in ("branch_down", "branch_up"):
            parts["LoRA branches"] += size
        elif owner == "time_proj":
            parts["time features"] += size
        else:
            parts["biases, norms, other tensors"] += size
            count = torch.Size(shape).numel()
            other_parameters += count
            is_weight = kind == "weight" and len(shape) in (2, 4) and not owner.endswith(_EMBEDDINGS)
            other_weights += count if is_weight else 0
    parts["headers and config.json"] = overhead

    time = schema.time_features
    steps = len(time.timesteps) if time.kind == "cache" else len(PAPER_TIMESTEPS)
    packed = sum(count for _, count in layers.values())
    histogram: dict[int, tuple[int, int]] = {}
    for bits, count in layers.values():
        number, weights = histogram.get(bits, (0, 0))
        histogram[bits] = (number + 1, weights + count)
    return SizeReport(
        where=where,
        parts=parts,
        average_bits=average_bits(
            layers,
            balance=schema.balance,
            other_weights=other_weights,
            removed_weights=time.removed_weights,
            cached=cached_bits(time.num_features, steps),
        ),
        weights=packed + other_weights + time.removed_weights,
        original_parameters=packed + other_parameters + time.removed_parameters,
        histogram=histogram,
    )
