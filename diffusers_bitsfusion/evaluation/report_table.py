"""Figures of a report: nested dicts that JSON can hold, and the same as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .compositional import OVERALL, ConfidenceInterval

# Pictures from which on intervals are shown.
MIN_FOR_INTERVALS = 10

# Where a figure is better; those of categories are as the compositional score that they are parts of.
_BETTER = {
    "compositional": "↑",
    "clip_score": "↑",
    "psnr": "↑",
    "ssim": "↑",
    "mse": "↓",
    "lpips": "↓",
    "clip_fid": "↓",
    "cmmd": "↓",
}


def as_figures(intervals: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, and under "intervals" the bounds of those that have them; None stands for infinity.

    Args:
        intervals: `ConfidenceInterval`s and plain numbers by name, or mappings of such.
    """
    return _values(intervals) | {"intervals": _intervals(intervals)}


def format_report(report: Mapping[str, Any]) -> str:
    """Return the figures of `evaluate` or of a suite as a table: value, 95 % interval, reference, difference.

    Above it is how the images were sampled; an arrow behind a name points to what is better. Of few images there are
    no intervals: resampling so few says little of what others would be. Of `evaluate_suites`, one table a suite.
    """
    if "suites" in report:
        return "\n\n".join(f"{name}\n{format_report(part)}" for name, part in report["suites"].items())
    if "by_guidance_scale" in report:
        parts = report["by_guidance_scale"].items()
        return "\n\n".join(f"guidance scale {scale}\n{format_report(part)}" for scale, part in parts)
    settings = report.get("settings", {})
    are_few = settings.get("images", MIN_FOR_INTERVALS) < MIN_FOR_INTERVALS
    reference, difference = report.get("reference", {}), report.get("difference", {})
    columns = {
        "value": _rows(report),
        "95 % interval": {} if are_few else _rows(report["intervals"]),
        "reference": _rows(reference),
        "difference": _rows(difference),
        "its 95 % interval": {} if are_few else _rows(difference.get("intervals", {})),
    }
    used = {title: column for title, column in columns.items() if column}
    lines = [describe_settings(settings)] if settings else []
    lines.append(f"{'':<18}" + "".join(f"{title:>20}" for title in used))
    for name in columns["value"]:
        named = f"{name} {_BETTER.get(name.strip(), _BETTER['compositional'])}"
        lines.append(f"{named:<18}" + "".join(f"{column.get(name, ''):>20}" for column in used.values()))
    if are_few:
        lines.append(f"(no intervals of fewer than {MIN_FOR_INTERVALS} images)")
    return "\n".join(lines + ([report["note"]] if "note" in report else []))


def describe_settings(settings: Mapping[str, Any]) -> str:
    """Return how the images of a report were sampled, on one line."""
    return (
        f"{settings['images']} images, {settings['steps']} steps, guidance scale {settings['guidance_scale']}, seed "
        f"{settings['seed']}, {settings['scheduler']}"
    )


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
