"""Loss curves of what benchmarks.ablation trained, a panel for each stage.

    python -m benchmarks.losses WORK [WORK ...] --out PNG

A line is one training seed, the running mean of so many steps (`--window`) of the noise's error: against the
teacher's in Stage I, without the features, and against the noise itself in Stage II.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffusers_bitsfusion.training.loop import LOG_FILE

STAGES = {
    "stage1": "Stage I: difference from the teacher's noise",
    "stage2": "Stage II: difference from the true noise",
}
# What the picture calls the rows of benchmarks.ablation; others keep their names.
LABELS = {
    "+ Beta timesteps = Stage I": "from plain rounding",
    "Stage I, calibrated start": "from calibrated rounding",
    "Stage II, calibrated start": "2 bits, calibrated start",
    "full precision, Stage II's data": "full precision (control)",
}

# Row and seed to the errors of the noise, step by step.
Curves = dict[tuple[str, str], list[float]]


def read(works: Iterable[Path], stage: str) -> Curves:
    found: Curves = {}
    for file in sorted(file for work in works for file in work.glob(f"*/{stage}/{LOG_FILE}")):
        row, seed = file.parent.parent.name.rsplit(", seed ", 1)
        found[row, seed] = [json.loads(line)["noise"] for line in file.read_text().splitlines()]
    return found


def plot(axes: Axes, curves: Curves, window: int) -> None:
    colours = {row: f"C{i}" for i, row in enumerate(sorted({row for row, _ in curves}))}
    labelled = set()
    for (row, _), errors in curves.items():
        means = np.convolve(errors, np.full(window, 1 / window), mode="valid")
        label = None if row in labelled else LABELS.get(row, row)
        axes.plot(np.arange(len(means)) + window, means, c=colours[row], lw=1, label=label)
        labelled.add(row)
    axes.legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("works", type=Path, nargs="+", metavar="WORK", help="--work of benchmarks.ablation")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    parser.add_argument("--window", type=int, default=10, help="steps of a mean")
    arguments = parser.parse_args()
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (stage, title) in zip(figure.subplots(1, len(STAGES)), STAGES.items(), strict=True):
        plot(axes, read(arguments.works, stage), arguments.window)
        axes.set(yscale="log", xlabel="training step", ylabel="mean squared error", title=title)
        axes.grid(alpha=0.3)
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
