"""The result of a sensitivity analysis: one file of JSON lines, a header and a line for each (layer, bits)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.errors import DamagedFileError, shown
from ..utils.json_files import is_count, is_list_of, is_number, parse_json

FORMAT = "bitsfusion-analysis"
VERSION = 1
RESULT_FILE = "analysis.jsonl"

_REMEDY = "Run `bitsfusion analyze` again."

Item = tuple[str, int]


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs and loses at each number of bits, known before anything is drawn.

    Attributes:
        shape: of the weight.
        bytes: in the file at 1 to 7 bits: entropy-coded codes and fp32 scales.
        weight_error: squared error ||w - Q(w)||^2 of the rounded weight at 1 to 7 bits.
    """

    shape: tuple[int, ...]
    bytes: tuple[int, ...]
    weight_error: tuple[float, ...]

    @property
    def weights(self) -> int:
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class Header:
    """What an analysis measured, on which model, how; the first line of its file.

    Attributes:
        method: "full" or an estimate's name, see `sensitivity.METHODS`.
        metrics: what each line holds; the first one stands for the damage that allocation minimises.
        bits: numbers of bits measured for every layer.
        model: "class" and "fingerprint" (SHA-256 of the weights).
        layers: cost of every layer, by module name in the model's order.
        fixed_bits: bits in the paper's formula that no recipe decides: first and last layer, time embedding.
        weights: weights that the paper's average is over.
        settings: how it was measured; JSON-safe.
        versions: of the packages used.
        run: names the model, the method and the settings in every line.
    """

    method: str
    metrics: tuple[str, ...]
    bits: tuple[int, ...]
    model: Mapping[str, str]
    layers: Mapping[str, LayerCost]
    fixed_bits: float
    weights: int
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    run: str

    @property
    def items(self) -> list[Item]:
        """Every (layer, bits) to measure, in the order of the finished file."""
        return [(name, bits) for name in self.layers for bits in self.bits]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe content."""
        layers = {name: dict(cost.__dict__) for name, cost in self.layers.items()}
        return {"format": FORMAT, "version": VERSION, **self.__dict__, "layers": layers}

    @classmethod
    def from_dict(cls, content: Any, where: str) -> Header:
        """Inverse of `to_dict`.

        Raises:
            ValueError: not the header of an analysis, or of a newer version; the message names `where`.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{where} is not an analysis: it does not begin with the header of {FORMAT}.")
        version = content.get("version")
        if isinstance(version, int) and version > VERSION:
            raise ValueError(
                f"{where} has version {version}, newer than the {VERSION} that this diffusers_bitsfusion reads. "
                "Upgrade with `pip install -U diffusers_bitsfusion`."
            )
        values: dict[str, Any] = {key: value for key, value in content.items() if key not in ("format", "version")}
        problem = _problem_of_header(values) if version == VERSION else f"version is {shown(version)}"
        if problem is not None:
            raise DamagedFileError(f"The header of {where}", f"is damaged: {problem}", _REMEDY)
        values |= {key: tuple(values[key]) for key in ("metrics", "bits")}
        values["layers"] = {
            name: LayerCost(tuple(cost["shape"]), tuple(cost["bytes"]), tuple(cost["weight_error"]))
            for name, cost in values["layers"].items()
        }
        return cls(**values)


@dataclass(frozen=True)
class Analysis:
    """A finished analysis.

    Attributes:
        header: what was measured and how.
        records: metrics by (layer, bits); None stands for an infinite PSNR.
    """

    header: Header
    records: Mapping[Item, Mapping[str, float | None]] = field(repr=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Analysis:
        """Read a finished analysis: the folder that `bitsfusion analyze` wrote, or its `analysis.jsonl`.

        Raises:
            FileNotFoundError: no such file, or the analysis in the folder is not finished.
            ValueError: lines are damaged, missing, doubled, or of another analysis or model; the message names them.
        """
        file = Path(path)
        if file.is_dir():
            file = file / RESULT_FILE
            if not file.is_file():
                raise FileNotFoundError(
                    f"{path} holds no {RESULT_FILE}: the analysis there is not finished, or there is none. "
                    "`bitsfusion analyze` with the same arguments goes on where it stopped."
                )
        lines = file.read_bytes().removesuffix(b"\n").split(b"\n")
        header = Header.from_dict(parse_line(lines[0], f"{file}, line 1"), str(file))
        records: dict[Item, Mapping[str, float | None]] = {}
        for number, line in enumerate(lines[1:], start=2):
            where = f"{file}, line {number}"
            item, metrics = check_record(parse_line(line, where), header, where)
            if item in records:
                raise ValueError(f"{where}: {item[0]} at {item[1]} bits is there twice.")
            records[item] = metrics
        missing = [f"{name} at {bits} bits" for name, bits in header.items if (name, bits) not in records]
        if missing:
            raise ValueError(f"{file} lacks {len(missing)} of {len(header.items)} lines: {_some(missing)}.")
        return cls(header, {item: records[item] for item in header.items})

    def to_text(self) -> str:
        """Content of the file that `load` reads."""
        lines = [self.header.to_dict()]
        lines += [format_record(self.header, item, metrics) for item, metrics in self.records.items()]
        return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight shape by layer."""
        return {name: cost.shape for name, cost in self.header.layers.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Number of weights by layer."""
        return {name: cost.weights for name, cost in self.header.layers.items()}

    def metric(self, name: str, bits: int) -> np.ndarray:
        """One metric of all layers in the header's order, (layers,) float64; infinity where it is None."""
        values = [self.records[layer, bits][name] for layer in self.header.layers]
        return np.array([np.inf if value is None else value for value in values], np.float64)

    def by(self, metric: str) -> Analysis:
        """The same analysis with another of its metrics standing for damage.

        Raises:
            ValueError: the analysis has no such metric, or it is one that is larger for the better picture and no
                PSNR.
        """
        choices = [name for name in self.header.metrics if name != "ssim"]
        if metric not in choices:
            raise ValueError(f"metric must be one of {', '.join(choices)} for this analysis; got {metric!r}.")
        others = tuple(name for name in self.header.metrics if name != metric)
        return Analysis(replace(self.header, metrics=(metric, *others)), self.records)

    def damage(self, bits: int) -> dict[str, float]:
        """The metric that stands for damage, by layer.

        PSNR does as the MSE that belongs to it. Its mean over pictures is that of the MSE's logarithm, so it says how
        far all pictures move, where the mean MSE says how many have become other pictures.
        """
        first = self.header.metrics[0]
        values = self.metric(first, bits)
        values = 10 ** (-values / 10) if first == "psnr" else values
        return dict(zip(self.header.layers, values.tolist(), strict=True))

    def clip_drop(self, bits: int) -> dict[str, float] | None:
        """The drop of the CLIP score by layer, where the analysis has it."""
        if "clip_drop" not in self.header.metrics:
            return None
        return dict(zip(self.header.layers, self.metric("clip_drop", bits).tolist(), strict=True))

    def check_model(self, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
        """Refuse a model of another architecture; a fine-tune of the same one is fine.

        Args:
            shapes: weight shape by name of the model's layers that a recipe decides, see `plan.recipe_layers`.
            what: names the model in the message.

        Raises:
            ValueError: layers are missing, left over, or of another shape.
        """
        own = self.shapes
        for problem, names in (
            ("lacks", [name for name in own if name not in shapes]),
            ("also has", [name for name in shapes if name not in own]),
            ("has in other shapes", [n for n in own if n in shapes and own[n] != tuple(shapes[n])]),
        ):
            if names:
                raise ValueError(f"The analysis is of another model: {what} {problem} {_some(names)}.")


def format_record(header: Header, item: Item, metrics: Mapping[str, float | None]) -> dict[str, Any]:
    """The line of one (layer, bits), JSON-safe: {"run", "layer", "bits", and the metrics}."""
    return {"run": header.run, "layer": item[0], "bits": item[1], **metrics}


def check_record(content: Any, header: Header, where: str) -> tuple[Item, dict[str, float | None]]:
    """The (layer, bits) and metrics of a parsed line.

    Raises:
        ValueError: the line does not belong to the header's analysis, or lacks a metric; the message names `where`.
    """
    if not isinstance(content, dict) or content.get("run") != header.run:
        raise ValueError(f"{where} is not of this analysis, but of another model or other settings.")
    layer: Any = content.get("layer")
    bits: Any = content.get("bits")
    if not isinstance(layer, str) or layer not in header.layers or not is_count(bits) or bits not in header.bits:
        raise ValueError(f"{where}: the analysis has no layer {shown(layer)} at {shown(bits)} bits.")
    metrics = {name: content[name] for name in (*header.metrics, "seconds") if name in content}
    if missing := [name for name in header.metrics if name not in metrics]:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    for name, value in metrics.items():
        if not (is_number(value) or value is None and name == "psnr"):
            raise ValueError(f"{where}: {name} is {shown(value)}, not a number.")
    return (layer, bits), metrics


def parse_line(line: bytes, where: str) -> Any:
    """Return what a line holds.

    Raises:
        DamagedFileError: it is not one JSON document; the message begins with `where`.
    """
    return parse_json(line, where, object, non_finite=True, remedy=_REMEDY)


def _problem_of_header(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the fields of a `Header` as they were read; None where nothing is."""
    names = [field.name for field in fields(Header)]
    if missing := [name for name in names if name not in values]:
        return f"{missing[0]!r} is missing"
    if unknown := [name for name in values if name not in names]:
        return f"{shown(unknown[0])} is unknown"
    checks = {
        "method": lambda value: isinstance(value, str),
        "run": lambda value: isinstance(value, str),
        "metrics": lambda value: is_list_of(value, str) and value and len(set(value)) == len(value),
        "bits": lambda value: (
            is_list_of(value, int) and value and all(is_count(n, 1) and n <= 7 for n in value) and _increases(value)
        ),
        "model": lambda value: _is_texts(value) and value.keys() >= {"class", "fingerprint"},
        "layers": lambda value: isinstance(value, dict) and value and all(map(_is_cost, value.values())),
        "fixed_bits": lambda value: is_number(value) and value >= 0,
        "weights": lambda value: is_count(value, 1),
        "settings": lambda value: isinstance(value, dict),
        "versions": _is_texts,
    }
    wrong = next((name for name, check in checks.items() if not check(values[name])), None)
    return None if wrong is None else f"{wrong} is {shown(values[wrong])}"


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and is_list_of(list(value.values()), str)


def _increases(values: Sequence[int]) -> bool:
    return list(values) == sorted(set(values))


def _is_cost(value: Any) -> bool:
    """Whether it is a `LayerCost` as it was read."""
    return (
        isinstance(value, dict)
        and value.keys() == {"shape", "bytes", "weight_error"}
        and all(isinstance(part, (list, tuple)) for part in value.values())
        and bool(value["shape"])
        and all(is_count(size, 1) for size in value["shape"])
        and math.prod(value["shape"]) < 1 << 40
        and len(value["bytes"]) == len(value["weight_error"]) == 7
        and all(is_count(size, 1) for size in value["bytes"])
        and all(is_number(error) and error >= 0 for error in value["weight_error"])
    )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
