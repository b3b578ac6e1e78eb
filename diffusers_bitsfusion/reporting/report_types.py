"""Reports on size as data and text, and the report of a model from the sizes of its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..allocation.average_bits import PAPER_TIMESTEPS, AverageBits, average_bits, cached_bits
from ..codec.grid import levels
from ..codec.schema import CheckpointSchema
from ..ops.dispatch import KernelSelection
from ..packing.file_budget import TensorSize

# Bytes of a megabyte, as vendors of disks and the Hub count.
MB = 1e6

# Names of tables of embeddings, which are neither Linear nor Conv2d, though their tensors in a file look alike.
_EMBEDDINGS = (
    "class_embedding",
    "token_embedding",
    "position_embedding",
    "embed_tokens",
    "shared",
    "relative_attention_bias",
)

# Names of the parts of a report, in the order of its lines.
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
    """The bytes of one quantized model, by part.

    Attributes:
        where: "file" or "memory".
        parts: bytes by part; LoRA branches are fused LoRAs and, in memory, loaded ones.
        average_bits: by both conventions.
        weights: Linear and Conv2d weights of the original model.
        original_parameters: all parameters of the original model.
        histogram: bits to (layers, weights).
        kernels: how each packed layer of a model in memory computes, and why; empty for files.
        attention_kernels: the same of its attention, where `set_compute` chose it.
        norm_kernels: the same of its norms of groups.
        checksums: whether a file has a checksum of every tensor; None of what is no file.
        left: number of weights, of two dimensions or more, that stay in floating point, by the reason.
    """

    where: str
    parts: dict[str, int]
    average_bits: AverageBits
    weights: int
    original_parameters: int
    histogram: dict[int, tuple[int, int]]
    kernels: dict[str, KernelSelection] = field(default_factory=dict)
    attention_kernels: dict[str, str] = field(default_factory=dict)
    norm_kernels: dict[str, str] = field(default_factory=dict)
    checksums: bool | None = None
    left: dict[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts."""
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
        """Return JSON-safe content, derived figures included."""
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
            "kernels": {name: asdict(kernel) for name, kernel in self.kernels.items()},
            "attention_kernels": self.attention_kernels,
            "norm_kernels": self.norm_kernels,
            "checksums": self.checksums,
            "left_in_floating_point": self.left,
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
        if self.left:
            lines += ["", f"{'weights':>12}  left in floating point"]
            lines += [f"{count:>12,}  {reason}" for reason, count in self.left.items()]
        if self.kernels:
            lines += ["", f"{'layers':>6}  computed"]
        for kernel, count in Counter(self.kernels.values()).most_common():
            lines.append(f"{count:>6}  {kernel.arithmetic}, weights {kernel.weights}: {kernel.reason}")
        for how, count in Counter(self.attention_kernels.values()).most_common():
            lines.append(f"{count:>6}  attention {how}")
        for how, count in Counter(self.norm_kernels.values()).most_common():
            lines.append(f"{count:>6}  norms of groups {how}")
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
        """Bytes of all components."""
        return sum(report.total_bytes for report in self.quantized.values()) + sum(self.others.values())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe content."""
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


def report_of_tensors(
    where: str,
    tensors: Iterable[TensorSize],
    schema: CheckpointSchema,
    overhead: int,
    excluded: Sequence[str] = (),
) -> SizeReport:
    """Return the report of a model from its tensors' names and sizes.

    Args:
        where: "file", "memory" or the like, for the reader.
        tensors: of the packed model.
        schema: what the checkpoint holds.
        overhead: bytes that belong to no tensor.
        excluded: names of modules that were not to be quantized.
    """
    layers = {name: (layer.bits, layer.num_weights) for name, layer in schema.layers.items()}
    parts = dict.fromkeys(_PARTS, 0)
    other_parameters = other_weights = 0
    left: Counter[str] = Counter()
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
            if len(shape) > 1:
                left[_why_left(name, shape, excluded)] += count
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
        left=dict(left.most_common()),
    )


def _why_left(name: str, shape: tuple[int, ...], excluded: Sequence[str]) -> str:
    owner, _, kind = name.rpartition(".")
    if any(f".{pattern}." in f".{owner}." for pattern in excluded):
        return "named in modules_to_not_convert"
    if kind == "weight" and len(shape) == 2 and ("emb" in owner or owner.endswith(_EMBEDDINGS)):
        return "embeddings, which embeddings=True packs"
    if kind == "weight":
        return "layers that the recipe leaves out, or that the model keeps in fp32"
    return "parameters that belong to no layer, such as tables of positions"
