"""Figures of an analysis by matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, groupby

import numpy as np

from ..utils.installation import install_command

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(f"The report needs matplotlib: {install_command('plot')}") from error

from ..allocation.paper_rule import ETA
from .results import Analysis
from .statistics import metric_correlations, width_correlations

# Colours by number of bits, the smallest number first; by rule; of uniform recipes; of bands of layers.
_WIDTH_COLOURS = ("#d1495b", "#edae49", "#00798c", "#30638e", "#003d5b")
_RULE_COLOURS = ("#00798c", "#d1495b", "#edae49", "#30638e")
_GREY = "#8c8c8c"
_BANDS = ("#f4f5f7", "#ffffff")

# Parts of module names in diffusers' UNets that name lists of modules.
_CONTAINERS = ("resnets", "attentions")

# Points (bytes, predicted sensitivity) of the recipes of one rule.
Curve = Sequence[tuple[float, float]]


def kind_of(layer: str) -> str:
    """Return the kind of a layer by its name: "attn2.to_k" of "down_blocks.0.attentions.1...0.attn2.to_k"."""
    parts = [part for part in layer.split(".") if not part.isdigit()]
    return ".".join(part for part in parts if not part.rstrip("s").endswith("block") and part not in _CONTAINERS)


def block_of(layer: str) -> str:
    """Return the block of a layer by its name: "down 0", "mid"; the first part of the name where it has no block."""
    first, *rest = layer.split(".")
    stem = first.removesuffix("_blocks").removesuffix("_block")
    return f"{stem} {rest[0]}" if first.endswith("_blocks") and rest[:1] and stem in ("down", "up") else stem


def execution_order(layers: Iterable[str]) -> list[str]:
    """Return layer names with the mid block between down and up, where a UNet's modules list it last."""
    places = {"down": 1, "mid": 2, "up": 3}
    return sorted(layers, key=lambda name: places.get(block_of(name).split()[0], 0))


def sensitivity_by_layer(analysis: Analysis) -> tuple[Figure, dict[str, str]]:
    """Plot the sensitivity of every layer at every number of bits, in execution order; blocks are bands.

    Returns:
        (figure, title of each point by its id in the SVG).
    """
    figure, axes = _plot(4.2)
    layers = execution_order(analysis.header.layers)
    _blocks(axes, layers)
    points = {}
    for bits, colour in zip(analysis.header.bits, _WIDTH_COLOURS, strict=False):
        sensitivity = analysis.sensitivity(bits)
        axes.plot([], "o", ms=4, c=colour, label=f"n = {bits}")
        for place, name in enumerate(layers):
            if sensitivity[name] > 0:  # The axis is logarithmic.
                point = f"point-{bits}-{place}"
                axes.plot([place], [sensitivity[name]], "o", ms=4, c=colour, gid=point)
                points[point] = f"{name}, n = {bits}: {sensitivity[name]:.3g}"
    first = analysis.header.metrics[0]
    title = "MSE, geometric mean" if first == "psnr" else _title(first)
    axes.set(yscale="log", ylabel=title, xlabel="layer, in execution order")
    axes.legend(ncols=3, loc="upper left", bbox_to_anchor=(0, -0.1), frameon=False, borderpad=0)
    return figure, points


def sensitivity_by_kind(analysis: Analysis) -> Figure:
    """Plot the sensitivity by size, S = M N^-0.3 (paper, section 5), of every layer, by kind, most sensitive first.

    M is measured at the middle one of the numbers of bits.
    """
    sizes, sensitivity = analysis.sizes, analysis.sensitivity(analysis.header.bits[len(analysis.header.bits) // 2])
    scores: dict[str, list[float]] = {}
    for name, value in sensitivity.items():
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
    """Plot the bits that each rule gives each layer, in execution order.

    Args:
        recipes: bits by layer, by rule.
    """
    layers = execution_order(next(iter(recipes.values())))
    grid = np.array([[bits[name] for name in layers] for bits in recipes.values()])
    figure, axes = _plot(1.1 + 0.5 * len(recipes))
    colours = colormaps["YlGnBu"].resampled(7)
    image = axes.imshow(
        grid, aspect="auto", cmap=colours, norm=BoundaryNorm(np.arange(0.5, 8), 7), interpolation="none"
    )
    axes.set(yticks=range(len(recipes)), yticklabels=list(recipes), xlabel="layer, in execution order")
    axes.set_yticks(np.arange(0.5, len(recipes) - 1), minor=True)
    axes.grid(which="minor", axis="y", color="white", lw=3)
    axes.tick_params(which="minor", length=0)
    for end in _block_ends(layers)[:-1]:
        axes.axvline(end - 0.5, color="white", lw=1.5)
    figure.colorbar(image, ax=axes, ticks=range(1, 8), label="bits", pad=0.01)
    return figure


def correlations(analysis: Analysis) -> Figure:
    """Plot |Pearson| between metrics at each number of bits, and of each metric between numbers of bits."""
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


def sensitivity_by_size(curves: Mapping[str, Curve], points: Mapping[str, tuple[float, float]]) -> Figure:
    """Plot predicted total sensitivity over megabytes: a curve for each rule, a point for each uniform recipe.

    Args:
        curves: points (bytes, predicted sensitivity) by rule.
        points: (bytes, predicted sensitivity) of uniform recipes by label.
    """
    figure, axes = _plot(4.6)
    for (rule, curve), colour in zip(curves.items(), _RULE_COLOURS, strict=False):
        sizes, sensitivities = zip(*curve, strict=True)
        axes.plot(np.array(sizes) / 1e6, sensitivities, "o-", ms=3.5, c=colour, label=rule)
    for label, (size, sensitivity) in points.items():
        axes.plot(size / 1e6, sensitivity, "s", ms=6, c=_GREY)
        axes.annotate(label, (size / 1e6, sensitivity), (7, 4), textcoords="offset points", color=_GREY, size=9)
    axes.set(
        yscale="log",
        ylabel="predicted sensitivity, summed over layers",
        xlabel="layers in the file, entropy coded, MB",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _title(metric: str) -> str:
    names = {"mse": "MSE", "psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "clip_drop": "CLIP drop"}
    return names.get(metric, metric.replace("_", " "))


def _block_ends(layers: Sequence[str]) -> list[int]:
    """Return the index after the last layer of each block."""
    lengths = [len(list(group)) for _, group in groupby(layers, block_of)]
    return list(accumulate(lengths))


def _blocks(axes: Axes, layers: Sequence[str]) -> None:
    ends = _block_ends(layers)
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        axes.axvspan(start - 0.5, end - 0.5, color=_BANDS[number % 2], zorder=0, lw=0)
        place = (start + end - 1) / 2
        axes.text(place, 1.01, block_of(layers[start]), transform=axes.get_xaxis_transform(), ha="center", size=8)
    axes.set_xlim(-0.5, len(layers) - 0.5)


def _plot(height: float) -> tuple[Figure, Axes]:
    """Return a figure as wide as the page, `height` inches high, and its axes."""
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
