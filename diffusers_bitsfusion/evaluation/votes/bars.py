"""The votes as bars, drawn by matplotlib."""

from __future__ import annotations

import os
from pathlib import Path

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("The picture of the votes needs matplotlib: pip install diffusers_bitsfusion[plot]") from error

from .report import PreferenceReport
from .store import QUESTIONS

_COLORS = ("#2a6fbb", "#d9d9d9", "#e08a3c")


def save_bars(report: PreferenceReport, path: str | os.PathLike[str], destination: str, source: str) -> None:
    """Write a PNG of stacked bars: for each question and category the shares of both and of neither.

    Args:
        report: of `preference_report`.
        path: file to write.
        destination, source: names of the two.
    """
    rows = len(next(iter(report.questions.values())))
    figure = Figure(figsize=(6 * len(QUESTIONS), 1.4 + 0.4 * rows), layout="constrained")
    axes = figure.subplots(1, len(QUESTIONS), sharey=True)
    for panel, (question, groups) in zip(axes, report.questions.items(), strict=True):
        names, left = list(groups), [0.0] * len(groups)
        parts = ("destination", "neither", "source")
        for part, label, color in zip(parts, (destination, "neither", source), _COLORS, strict=True):
            counts = [(getattr(g, part), g.destination + g.neither + g.source) for g in groups.values()]
            shares = [100 * count / max(total, 1) for count, total in counts]
            bars = panel.barh(names, shares, left=left, color=color, label=label)
            panel.bar_label(bars, [f"{share:.0f}" if share >= 5 else "" for share in shares], label_type="center")
            left = [a + b for a, b in zip(left, shares, strict=True)]
        panel.set(title=QUESTIONS[question], xlabel="votes (%)", xlim=(0, 100))
        panel.axvline(50, color="black", linewidth=0.8, linestyle=":")
    axes[0].invert_yaxis()
    axes[0].legend(*axes[0].get_legend_handles_labels(), loc="lower left", fontsize="small")
    figure.savefig(Path(path), format="png", dpi=150)
