"""Pictures of an analysis, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("The report needs matplotlib: pip install diffusers_bitsfusion[plot]") from error

from ..allocation.paper_rule import ETA
from .results import Analysis
from .statistics import metric_correlations, width_correlations

_WIDTH_COLOURS = ("#d1495b", "#edae49", "#00798c", "#30638e", "#003d5b")  # fewest bits first
_RULE_COLOURS = ("#00798c", "#d1495b", "#edae49", "#30638e")
_GREY = "#8c8c8c"
_BANDS = ("#f4f5f7", "#ffffff")
_CONTAINERS = ("resnets", "attentions")

# Rule name to (bytes, damage) of its recipes.
Curve = Sequence[tuple[float, float]]


def kind_of(layer: str) -> str:
    """What a layer does, from its name: "attn2.to_k" of "down_blocks.0.attentions.1...0.attn2.to_k"."""
    parts = [part for part in layer.split(".") if not part.isdigit()]
    return ".".join(part for part in parts if not part.rstrip("s").endswith("block") and part not in _CONTAINERS)


def block_of(layer: str) -> str:
    """The block a layer is in, from its name: "down 0", "mid"; its first part where there are no blocks."""
    first, *rest = layer.split(".")
    stem = first.removesuffix("_blocks").removesuffix("_block")
    return f"{stem} {rest[0]}" if first.endswith("_blocks") and rest[:1] and stem in ("down", "up") else stem


def in_order_of_computing(layers: Iterable[str]) -> list[str]:
    """Layer names with the mid block between down and up, where a UNet's modules list it last."""
    places = {"down": 1, "mid": 2, "up": 3}
    return sorted(layers, key=lambda name: places.get(block_of(name).split()[0], 0))


def sensitivity_by_layer(analysis: Analysis) -> tuple[Figure, dict[str, str]]:
    """The damage of every layer at every number of bits, in the order of computing; blocks as bands.

    Returns:
        (figure, what each point is by its id in the picture).
    """
    figure, axes = _plot(4.2)
    layers = in_order_of_computing(analysis.header.layers)
    _blocks(axes, layers)
    points = {}
    for bits, colour in zip(analysis.header.bits, _WIDTH_COLOURS, strict=False):
        damage = analysis.damage(bits)
        axes.plot([], "o", ms=4, c=colour, label=f"n = {bits}")
        for place, name in enumerate(layers):
            if damage[name] > 0:  # what is not is off the logarithmic axis
                point = f"point-{bits}-{place}"
                axes.plot([place], [damage[name]], "o", ms=4, c=colour, gid=point)
                points[point] = f"{name}, n = {bits}: {damage[name]:.3g}"
    first = analysis.header.metrics[0]
    title = "MSE, geometric mean" if first == "psnr" else _title(first)
    axes.set(yscale="log", ylabel=title, xlabel="layer, in the order of computing")
    axes.legend(ncols=3, loc="upper left", bbox_to_anchor=(0, -0.1), frameon=False, borderpad=0)
    return figure, points


def sensitivity_by_kind(analysis: Analysis) -> Figure:
    """The damage for its size, S = M N^-0.3, of every layer at 2 bits, by kind of layer, most sensitive kind first."""
    sizes, damage = analysis.sizes, analysis.damage(analysis.header.bits[len(analysis.header.bits) // 2])
    scores: dict[str, list[float]] = {}
    for name, value in damage.items():
        scores.setdefault(kind_of(name), []).append(value * sizes[name] ** -ETA)
    kinds = sorted(scores, key=lambda kind: float(np.median(scores[kind])))
    figure, axes = _plot(0.9 + 0.28 * len(kinds))
    for row, kind in enumerate(kinds):
        values = np.array(scores[kind])
        values = values[values > 0]
        axes.plot(values, np.full(len(values), row), "o", ms=5, c=_WIDTH_COLOURS[2], alpha=0.55, mew=0)
        if len(values):
            axes.plot(np.median(values), row, "|", ms=15, mew=2.5, c=_WIDTH_COLOURS[0])
    axes.set(xscale="log", yticks=range(len(kinds)), yticklabels=kinds, xlabel="S = M · N$^{-0.3}$, red: median")
    axes.grid(axis="x", alpha=0.3)
    return figure


def bits_by_layer(recipes: Mapping[str, Mapping[str, int]]) -> Figure:
    """The bits that each rule gives each layer, in the order of computing."""
    layers = in_order_of_computing(next(iter(recipes.values())))
    grid = np.array([[bits[name] for name in layers] for bits in recipes.values()])
    figure, axes = _plot(1.1 + 0.5 * len(recipes))
    colours = colormaps["YlGnBu"].resampled(7)
    image = axes.imshow(
        grid, aspect="auto", cmap=colours, norm=BoundaryNorm(np.arange(0.5, 8), 7), interpolation="none"
    )
    axes.set(yticks=range(len(recipes)), yticklabels=list(recipes), xlabel="layer, in the order of computing")
    axes.set_yticks(np.arange(0.5, len(recipes) - 1), minor=True)
    axes.grid(which="minor", axis="y", color="white", lw=3)
    axes.tick_params(which="minor", length=0)
    for end in _block_ends(layers)[:-1]:
        axes.axvline(end - 0.5, color="white", lw=1.5)
    figure.colorbar(image, ax=axes, ticks=range(1, 8), label="bits", pad=0.01)
    return figure


def correlations(analysis: Analysis) -> Figure:
    """|Pearson| between metrics at each number of bits, and of each metric between numbers of bits."""
    header = analysis.header
    matrices = [(f"metrics at n = {bits}", *metric_correlations(analysis, bits)) for bits in header.bits]
    widths = [f"n = {bits}" for bits in header.bits]
    between = [(f"{_title(name)} between n", widths, width_correlations(analysis, name)) for name in header.metrics]
    shown = (matrices if len(header.metrics) > 1 else []) + between
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.7 * columns, 3.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (title, names, matrix) in zip(grid.flat, shown, strict=False):
        axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
        ticks = range(len(names))
        labels = [_title(name) for name in names]
        axes.set(title=title, xticks=ticks, yticks=ticks, yticklabels=labels)
        axes.set_xticks(ticks, labels, rotation=30, ha="right")
        for (row, column), value in np.ndenumerate(matrix):
            text = "–" if np.isnan(value) else f"{value:.3f}"
            axes.text(column, row, text, ha="center", va="center", color="white" if value > 0.6 else "black", size=9)
    return figure


def damage_against_size(curves: Mapping[str, Curve], points: Mapping[str, tuple[float, float]]) -> Figure:
    """Predicted total damage over megabytes: a curve for each rule, a labelled point for each uniform recipe."""
    figure, axes = _plot(4.6)
    for (rule, curve), colour in zip(curves.items(), _RULE_COLOURS, strict=False):
        sizes, damages = zip(*curve, strict=True)
        axes.plot(np.array(sizes) / 1e6, damages, "o-", ms=3.5, c=colour, label=rule)
    for label, (size, damage) in points.items():
        axes.plot(size / 1e6, damage, "s", ms=6, c=_GREY)
        axes.annotate(label, (size / 1e6, damage), (7, 4), textcoords="offset points", color=_GREY, size=9)
    axes.set(
        yscale="log", ylabel="predicted damage, summed over layers", xlabel="layers in the file, entropy coded, MB"
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _title(metric: str) -> str:
    names = {"mse": "MSE", "psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "clip_drop": "CLIP drop"}
    return names.get(metric, metric.replace("_", " "))


def _block_ends(layers: Sequence[str]) -> list[int]:
    """Index after the last layer of each block."""
    lengths = [len(list(group)) for _, group in groupby(layers, block_of)]
    return np.cumsum(lengths).tolist()


def _blocks(axes, layers: Sequence[str]) -> None:
    ends = _block_ends(layers)
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        axes.axvspan(start - 0.5, end - 0.5, color=_BANDS[number % 2], zorder=0, lw=0)
        place = (start + end - 1) / 2
        axes.text(place, 1.01, block_of(layers[start]), transform=axes.get_xaxis_transform(), ha="center", size=8)
    axes.set_xlim(-0.5, len(layers) - 0.5)


def _plot(height: float) -> tuple[Figure, Axes]:
    """A figure as wide as the page, `height` inches high."""
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
