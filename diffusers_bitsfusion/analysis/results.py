"""Result of a sensitivity analysis: one file of JSON lines, a header and a line for each (layer, bits)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..utils.errors import shown
from ..utils.json_files import is_count, is_number, parse_json
from .header import REMEDY, Header, Item

# Name of the file of a finished analysis in its folder.
RESULT_FILE = "analysis.jsonl"


@dataclass(frozen=True)
class Analysis:
    """Finished analysis.

    Attributes:
        header: model, layers and settings of the measurement.
        records: metrics by (layer, bits); an infinite PSNR is None.
    """

    header: Header
    records: Mapping[Item, Mapping[str, float | None]] = field(repr=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Analysis:
        """Read a finished analysis.

        Args:
            path: folder that `bitsfusion analyze` wrote, or its `analysis.jsonl`.

        Raises:
            FileNotFoundError: there is no such file, or the analysis in the folder is not finished.
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
        """Return the content of the file that `load` reads."""
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

    def metric(self, name: str, bits: int) -> NDArray[np.float64]:
        """Return one metric of all layers in the header's order, [layers] float64; infinity where it is None."""
        values = [self.records[layer, bits][name] for layer in self.header.layers]
        return np.array([np.inf if value is None else value for value in values], np.float64)

    def by(self, metric: str) -> Analysis:
        """Return the same analysis with another of its metrics as the sensitivity.

        Args:
            metric: name of a metric that is smaller for the better image, or "psnr".

        Raises:
            ValueError: the analysis has no such metric, or it is "ssim", which is larger for the better image.
        """
        choices = [name for name in self.header.metrics if name != "ssim"]
        if metric not in choices:
            raise ValueError(f"metric must be one of {', '.join(choices)} for this analysis; got {metric!r}.")
        others = tuple(name for name in self.header.metrics if name != metric)
        return Analysis(replace(self.header, metrics=(metric, *others)), self.records)

    def sensitivity(self, bits: int) -> dict[str, float]:
        """Return the sensitivity by layer: the first metric of the header, smaller for the better image.

        PSNR is converted to MSE. Its mean over images is that of the logarithm of the MSE, so it measures how much all
        images change, where the mean MSE measures how many images became different ones.

        Args:
            bits: number of bits that each layer alone is rounded to.
        """
        first = self.header.metrics[0]
        values = self.metric(first, bits)
        values = 10 ** (-values / 10) if first == "psnr" else values
        return dict(zip(self.header.layers, values.tolist(), strict=True))

    def clip_drop(self, bits: int) -> dict[str, float] | None:
        """Return the drop of the CLIP score by layer; None where the analysis has none."""
        if "clip_drop" not in self.header.metrics:
            return None
        return dict(zip(self.header.layers, self.metric("clip_drop", bits).tolist(), strict=True))

    def check_model(self, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
        """Refuse a model of another architecture; a fine-tune of the same one is fine.

        Args:
            shapes: weight shape by name of the model's layers that a recipe decides, see `planning.recipe_layers`.
            what: name of the model in the message.

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
    """Return the JSON-safe line of one (layer, bits): {"run", "layer", "bits", and the metrics}."""
    return {"run": header.run, "layer": item[0], "bits": item[1], **metrics}


def check_record(content: Any, header: Header, where: str) -> tuple[Item, dict[str, float | None]]:
    """Return the (layer, bits) and metrics of a parsed line.

    Args:
        content: parsed JSON.
        header: header of the analysis.
        where: file and line, for messages.

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
        if not (is_number(value) or (value is None and name == "psnr")):
            raise ValueError(f"{where}: {name} is {shown(value)}, not a number.")
    return (layer, bits), metrics


def parse_line(line: bytes, where: str) -> Any:
    """Return the content of a line.

    Args:
        line: one JSON document in UTF-8.
        where: file and line, for messages.

    Raises:
        DamagedFileError: the line is not one JSON document; the message begins with `where`.
    """
    return parse_json(line, where, object, non_finite=True, remedy=REMEDY)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
