"""Figures of a report: nested dicts that JSON can hold, and the same as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .compositional import OVERALL, ConfidenceInterval


def as_figures(intervals: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, and under "intervals" the bounds of those that have them; None stands for infinity.

    Args:
        intervals: `ConfidenceInterval`s and plain numbers by name, or mappings of such.
    """
    return _values(intervals) | {"intervals": _intervals(intervals)}


def format_report(report: Mapping[str, Any]) -> str:
    """The figures of `evaluate` or of a suite as a table: value, 95 % interval, the reference's value, the difference.

    Of `evaluate_suites`, one table a suite.
    """
    if "suites" in report:
        return "\n\n".join(f"{name}\n{format_report(part)}" for name, part in report["suites"].items())
    if "by_guidance_scale" in report:
        parts = report["by_guidance_scale"].items()
        return "\n\n".join(f"guidance scale {scale}\n{format_report(part)}" for scale, part in parts)
    reference, difference = report.get("reference", {}), report.get("difference", {})
    columns = [
        _rows(report),
        _rows(report["intervals"]),
        _rows(reference),
        _rows(difference),
        _rows(difference.get("intervals", {})),
    ]
    titles = ("", "value", "95 % interval", "reference", "difference", "95 % interval")
    used = columns if reference else columns[:2]
    lines = [f"{titles[0]:<18}" + "".join(f"{title:>20}" for title in titles[1 : len(used) + 1])]
    lines += [f"{name:<18}" + "".join(f"{column.get(name, ''):>20}" for column in used) for name in columns[0]]
    return "\n".join(lines + ([report["note"]] if "note" in report else []))


def _values(intervals: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _values(item) if isinstance(item, Mapping) else _finite(getattr(item, "value", item))
        for name, item in intervals.items()
    }


def _intervals(intervals: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _intervals(item) if isinstance(item, Mapping) else [_finite(item.low), _finite(item.high)]
        for name, item in intervals.items()
        if isinstance(item, (Mapping, ConfidenceInterval))
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _rows(figures: Mapping[str, Any]) -> dict[str, str]:
    """Printable figures by name, those of categories indented under their overall score."""
    rows: dict[str, str] = {}
    for name, figure in figures.items():
        if isinstance(figure, Mapping) and OVERALL in figure:
            rows |= {name: _text(figure[OVERALL])}
            rows |= {f"  {category}": _text(value) for category, value in figure.items() if category != OVERALL}
        elif not isinstance(figure, (Mapping, str)):
            rows[name] = _text(figure)
    return rows


def _text(figure: float | None | Sequence[float | None]) -> str:
    if isinstance(figure, Sequence):
        return " to ".join(map(_text, figure))
    return "inf" if figure is None else f"{figure:.4f}"
