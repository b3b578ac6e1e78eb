"""Score and PSNR over the bytes of the file, of every row of results that the documentation has.

    python -m benchmarks.frontier "shapes=docs/results/calibration.md#At 2.03 bits" \
        "shapes=docs/results/training.md#From a calibrated start" --out docs/images/frontier.png

A source is a testbed, a page and the beginning of a heading of it: all tables below that heading that have the
columns "UNet file, kB", "score" and "PSNR, dB" are drawn, a row of panels for each testbed. The intervals are those of
the tables.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

FILE, SCORE, PSNR = "UNet file, kB", "score", "PSNR, dB"
# What a row's name says of its method; the first that fits.
METHODS = {
    "full precision": r"^full precision$",
    "SDNQ": r"SDNQ",
    "trained for its bytes": r"price",
    "trained": r"Stage|trained|latents",
    "tuned": r"tuned|guidance kept",
    "calibrated, for a file's bytes": r"calibrated for \d+ kB",
    "calibrated": r"calibrated",
    "rounded": r"rounded|uniform|mixed|by analysis",
}
TICKS = (500, 700, 1000, 1500, 2000, 3000, 5000, 7000)  # kB
NOT_DRAWN = re.compile(r"control|not trained|earlier|without guidance")


@dataclass(frozen=True)
class Point:
    """One row: kilobytes, score with its interval, PSNR where the row has one."""

    method: str
    size: float
    score: tuple[float, float, float]
    psnr: float | None


def rows(page: str, heading: str) -> Iterator[dict[str, str]]:
    """Cells by column of every row of the tables below a heading, until the next one of its level or above."""
    lines = page.splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(rf"#+ {re.escape(heading)}", line)]
    if len(starts) != 1:
        raise ValueError(f"{len(starts)} headings begin with {heading!r}")
    level = len(lines[starts[0]].split()[0])
    header: list[str] = []
    for line in lines[starts[0] + 1 :]:
        if re.match(rf"#{{1,{level}}} ", line):
            return
        cells = [cell.strip().strip("*").strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = ["name", *cells[1:]]
        elif not set(line) <= set("|-: "):
            yield dict(zip(header, cells, strict=False))


def number(cell: str) -> tuple[float, float, float] | None:
    """A figure and its interval, "0.610 (0.575 to 0.645)"; without one, the figure three times."""
    figures = [float(part.replace(",", "")) for part in re.findall(r"\d[\d,]*(?:\.\d+)?", cell.replace("**", ""))]
    if not figures:
        return None
    return (figures[0], figures[1], figures[2]) if len(figures) >= 3 else (figures[0],) * 3


def points(source: str) -> tuple[str, list[Point]]:
    """Testbed of a source TESTBED=PAGE#HEADING, and the points of its tables."""
    testbed, _, place = source.partition("=")
    page, _, heading = place.partition("#")
    found = []
    for row in rows(Path(page).read_text(encoding="utf-8"), heading):
        name = row["name"]
        size, score = number(row.get(FILE, "")), number(row.get(SCORE, ""))
        method = next((method for method, pattern in METHODS.items() if re.search(pattern, name)), None)
        if size and score and method and not NOT_DRAWN.search(name):
            psnr = number(row.get(PSNR, ""))
            found.append(Point(method, size[0], score, psnr[0] if psnr else None))
    if not found:
        raise ValueError(f"{source} has no table with the columns {FILE!r} and {SCORE!r}")
    return testbed, found


def plot(score: Axes, psnr: Axes, testbed: str, of_testbed: list[Point]) -> None:
    """Draw a testbed's points: full precision's score as a line, the others by method."""
    for index, method in enumerate(METHODS):
        own = [point for point in of_testbed if point.method == method]
        style = {"c": f"C{index}", "marker": "o", "ls": "", "ms": 4, "label": method}
        if method == "full precision":
            for point in own[:1]:
                score.axhline(point.score[0], c="grey", lw=1, label=f"full precision, {point.size:.0f} kB")
                score.axhspan(*point.score[1:], color="grey", alpha=0.15)
        elif own:
            below, above = zip(*((p.score[0] - p.score[1], p.score[2] - p.score[0]) for p in own), strict=True)
            score.errorbar([p.size for p in own], [p.score[0] for p in own], [below, above], lw=0.8, **style)
            psnr.plot([p.size for p in own if p.psnr], [p.psnr for p in own if p.psnr], **style)
    score.set(ylabel="score", title=testbed)
    psnr.set(ylabel="PSNR, dB", title=testbed)
    for axes in (score, psnr):
        axes.set(xscale="log", xlabel="file of the UNet, kB")
        axes.set_xticks(TICKS, [f"{tick:,}" for tick in TICKS])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    score.legend(frameon=False, fontsize=7)


def draw(sources: list[str], out: Path) -> None:
    """Draw all sources into a picture, a row of panels for each testbed."""
    by_testbed: dict[str, list[Point]] = {}
    for source in sources:
        testbed, found = points(source)
        by_testbed.setdefault(testbed, []).extend(found)
    figure = Figure(figsize=(11, 4.2 * len(by_testbed)), layout="constrained")
    panels = figure.subplots(len(by_testbed), 2, squeeze=False)
    for (score, psnr), (testbed, of_testbed) in zip(panels, by_testbed.items(), strict=True):
        plot(score, psnr, testbed, of_testbed)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", metavar="TESTBED=PAGE#HEADING")
    parser.add_argument("--out", type=Path, required=True, help="the picture, by its name's end: .svg, .png")
    arguments = parser.parse_args()
    draw(arguments.sources, arguments.out)


if __name__ == "__main__":
    main()
