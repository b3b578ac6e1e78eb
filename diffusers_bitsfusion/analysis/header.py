"""Header of the file of a sensitivity analysis: the model, the layers and the settings of the measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..utils.errors import DamagedFileError, shown
from ..utils.installation import install_command
from ..utils.json_files import is_count, is_list_of, is_number
from ..utils.safetensors_files import MAX_DIMENSIONS

# Value of "format" in a header.
FORMAT = "bitsfusion-analysis"

# Number of the newest version of the format, which this package writes.
VERSION = 1

# Advice in the messages of errors about damaged files.
REMEDY = "Run `bitsfusion analyze` again."

# Name of a layer and its number of bits.
Item = tuple[str, int]


@dataclass(frozen=True)
class LayerCost:
    """Size and rounding error of one layer at each number of bits, which need no sampling.

    Attributes:
        shape: shape of the weight.
        bytes: bytes in the file at 1 to 7 bits: entropy-coded codes and fp32 scales.
        weight_error: squared error ||w - Q(w)||^2 of the rounded weight at 1 to 7 bits.
    """

    shape: tuple[int, ...]
    bytes: tuple[int, ...]
    weight_error: tuple[float, ...]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """Header of an analysis, the first line of its file.

    Attributes:
        method: "full" or the name of an estimate, see `sensitivity.METHODS`.
        metrics: names of the metrics in each line; the first one is the sensitivity that allocation minimises.
        bits: numbers of bits measured for every layer.
        model: "class" and "fingerprint" (SHA-256 of the weights).
        layers: cost of every layer, by module name in the model's order.
        fixed_bits: bits in the paper's formula (section 5) that no recipe decides: first and last layer, time
            embedding.
        weights: number of weights that the paper's average is over.
        settings: JSON-safe settings of the measurement.
        versions: versions of the packages used.
        run: identifier of the model, the method and the settings, repeated in every line.
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
        """All (layer, bits) to measure, in the order of the finished file."""
        return [(name, bits) for name in self.layers for bits in self.bits]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-safe content."""
        layers = {name: dict(cost.__dict__) for name, cost in self.layers.items()}
        return {"format": FORMAT, "version": VERSION, **self.__dict__, "layers": layers}

    @classmethod
    def from_dict(cls, content: Any, where: str) -> Header:
        """Return the header of the content that `to_dict` returned.

        Args:
            content: parsed JSON.
            where: file, for messages.

        Raises:
            DamagedFileError: fields are missing, unknown or have impossible values.
            ValueError: the content is not the header of an analysis, or of a newer version.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{where} is not an analysis: it does not begin with the header of {FORMAT}.")
        version = content.get("version")
        if isinstance(version, int) and version > VERSION:
            raise ValueError(
                f"{where} has version {version}, newer than the {VERSION} that this diffusers_bitsfusion reads. "
                f"Upgrade with `{install_command(upgrade=True)}`."
            )
        values: dict[str, Any] = {key: value for key, value in content.items() if key not in ("format", "version")}
        problem = _problem_of_header(values) if version == VERSION else f"version is {shown(version)}"
        if problem is not None:
            raise DamagedFileError(f"The header of {where}", f"is damaged: {problem}", REMEDY)
        values |= {key: tuple(values[key]) for key in ("metrics", "bits")}
        values["layers"] = {
            name: LayerCost(tuple(cost["shape"]), tuple(cost["bytes"]), tuple(cost["weight_error"]))
            for name, cost in values["layers"].items()
        }
        return cls(**values)


def _problem_of_header(values: Mapping[str, Any]) -> str | None:
    """Return the problem of the fields of a `Header` from a file; None where they have none."""
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
    """Return whether a value from a file is a `LayerCost`."""
    return (
        isinstance(value, dict)
        and value.keys() == {"shape", "bytes", "weight_error"}
        and all(isinstance(part, (list, tuple)) for part in value.values())
        and bool(value["shape"])
        and len(value["shape"]) <= MAX_DIMENSIONS
        and all(is_count(size, 1) for size in value["shape"])
        and math.prod(value["shape"]) < 1 << 40
        and len(value["bytes"]) == len(value["weight_error"]) == 7
        and all(is_count(size, 1) for size in value["bytes"])
        and all(is_number(error) and error >= 0 for error in value["weight_error"])
    )
