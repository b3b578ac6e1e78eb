"""An analysis as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..utils.errors import printable
from ..utils.files import write_atomically
from . import plots as figures
from .allocate import RULES, Totals, allocate
from .layer_cost import WIDTHS
from .results import Analysis
from .statistics import rank_correlations

# Bits a weight over the analysed layers at which recipes are shown: the published recipe's average.
LAYER_BITS = 2.04

_SIZE = re.compile(r' width="[\d.]+pt" height="[\d.]+pt"')  # of a picture by matplotlib

_SWEEP = np.round(np.arange(1.7, 3.61, 0.1), 2)
_MOST_SENSITIVE = 10

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #24292f; max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .3rem; }
p { margin: .3rem 0 .8rem; } p.note { color: #57606a; } code { background: #f4f5f7; padding: .1rem .3rem; }
.wide { overflow-x: auto; } .wide img, .wide embed { display: block; width: 100%; min-width: 22rem; }
table { border-collapse: collapse; font-size: .93rem; } td, th { padding: .25rem .9rem .25rem 0; text-align: right; }
th { border-bottom: 1px solid #afb8c1; font-weight: 600; } td:first-child, th:first-child { text-align: left; }
"""


def write_report(
    analysis: Analysis,
    path: str | os.PathLike[str],
    *,
    layer_bits: float = LAYER_BITS,
    estimates: Sequence[Analysis] = (),
) -> None:
    """Write the page: sensitivity by layer and kind, recipes of all rules, correlations, damage against size.

    Args:
        analysis: a finished analysis, of any method.
        path: HTML file to write.
        layer_bits: average log2(levels) over the analysed layers of the recipes shown.
        estimates: other analyses of the same model, for how well their ranks agree with this one's.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no recipe has `layer_bits`, or an estimate is of another model.
    """
    header = analysis.header
    recipes = {rule: allocate(analysis, _target(analysis, layer_bits), rule=rule) for rule in RULES}
    sections = [
        f"<h1>Sensitivity of {escape(header.model['class'])}</h1>",
        f"<p class=note>{_summary(analysis)}</p>",
        "<h2>Sensitivity by layer</h2>",
        "<p>What rounding one layer alone to n bits does, everything else in full precision.</p>",
        _image(*figures.sensitivity_by_layer(analysis), alt="Damage of each layer at each number of bits"),
        "<p class=note>A point names its layer where the mouse rests on it.</p>",
        _most_sensitive(analysis),
        "<h2>Sensitivity by kind of layer</h2>",
        "<p>S = M · N<sup>−0.3</sup>, at the middle one of the numbers of bits: the damage M of a layer, made smaller "
        "the more weights N it has, since bits for a large layer cost more. The paper's rule gives bits by it.</p>",
        _image(figures.sensitivity_by_kind(analysis), alt="Damage for its size, S, of the layers of each kind"),
        "<h2>Bits by layer</h2>",
        f"<p>What each rule makes of {layer_bits:.2f} bits a weight over these layers.</p>",
        _image(figures.bits_by_layer(recipes), alt="Bits that each rule gives each layer"),
        _totals({rule: Totals.of(recipe, analysis) for rule, recipe in recipes.items()}),
        "<h2>Correlations</h2>",
        "<p>|Pearson| over the layers, between the metrics and between the numbers of bits.</p>",
        _image(figures.correlations(analysis), alt="Correlations between metrics and between numbers of bits"),
        *_ranks(analysis, estimates),
        "<h2>Damage against size</h2>",
        "<p>Predicted by adding up the layers' own; grey: the same bits everywhere.</p>",
        _image(figures.damage_against_size(_curves(analysis), _uniform(analysis)), alt="Predicted damage by size"),
        "<h2>Next</h2>",
        "<p>In the folder of the analysis, <code>bitsfusion allocate . --target-bits 1.99 --out recipe.json</code> "
        "writes a recipe for <code>bitsfusion quantize SRC DST --recipe recipe.json</code>.</p>",
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>Sensitivity</title><style>{_STYLE}</style>\n"
    )
    write_atomically(Path(path), printable(page + "\n".join(sections) + "\n</html>\n"))


def _target(analysis: Analysis, layer_bits: float) -> float:
    """The paper's average bits a weight that go with `layer_bits` over the analysed layers."""
    return (layer_bits * sum(analysis.sizes.values()) + analysis.header.fixed_bits) / analysis.header.weights


def _summary(analysis: Analysis) -> str:
    header = analysis.header
    shown = {key: value for key, value in header.settings.items() if key != "prompts"}
    if "prompts" in header.settings:
        shown["prompts"] = len(header.settings["prompts"])
    parts = [
        f"{len(header.layers)} layers, {sum(analysis.sizes.values()) / 1e6:.1f} M weights",
        f"{header.method} method",
    ]
    parts += [f"{key.replace('_', ' ')} {value}" for key, value in shown.items()]
    parts += [f"weights {header.model['fingerprint'][:12]}", f"torch {header.versions.get('torch', 'unknown')}"]
    return escape(" · ".join(parts))


def _most_sensitive(analysis: Analysis) -> str:
    columns = {bits: analysis.damage(bits) for bits in analysis.header.bits}
    first = columns[analysis.header.bits[0]]
    names = sorted(first, key=lambda name: first[name], reverse=True)[:_MOST_SENSITIVE]
    rows = [
        [name, f"{analysis.sizes[name]:,}", *(f"{damage[name]:.3g}" for damage in columns.values())] for name in names
    ]
    return _table(["most sensitive layers", "weights", *(f"n = {bits}" for bits in columns)], rows)


def _totals(totals: Mapping[str, Totals]) -> str:
    rows = [
        [rule, f"{t.layer_bits:.3f}", f"{t.paper_bits:.3f}", f"{t.bytes / 1e6:.3f}", f"{t.sensitivity:.4g}"]
        for rule, t in totals.items()
    ]
    return _table(["rule", "bits over layers", "bits, paper's formula", "MB, entropy coded", "predicted damage"], rows)


def _ranks(analysis: Analysis, estimates: Sequence[Analysis]) -> list[str]:
    if not estimates:
        return []
    ranks = {other.header.method: rank_correlations(analysis, other) for other in estimates}
    columns = list(next(iter(ranks.values())))
    rows = [[method, *(f"{values[column]:.3f}" for column in columns)] for method, values in ranks.items()]
    titles = ["method", *(f"n = {column}" if column != "all" else "all" for column in columns)]
    return [f"<p>Spearman's rank correlation of other methods with this one:</p>{_table(titles, rows)}"]


def _curves(analysis: Analysis) -> dict[str, figures.Curve]:
    """(bytes, damage) by rule over a sweep of targets, where the rule reaches them."""
    curves: dict[str, figures.Curve] = {}
    for rule in RULES:
        points = []
        for layer_bits in _SWEEP.tolist():
            try:
                recipe = allocate(analysis, _target(analysis, layer_bits), rule=rule)
            except ValueError:  # the paper's rule reaches from 1 bit to 4
                continue
            totals = Totals.of(recipe, analysis)
            points.append((totals.bytes, totals.sensitivity))
        curves[rule] = points
    return curves


def _uniform(analysis: Analysis) -> dict[str, tuple[float, float]]:
    points: dict[str, tuple[float, float]] = {}
    for bits in WIDTHS[:3]:
        totals = Totals.of(dict.fromkeys(analysis.header.layers, bits), analysis)
        points[f"n = {bits}"] = totals.bytes, totals.sensitivity
    return points


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _image(figure: Figure, titles: Mapping[str, str] | None = None, *, alt: str) -> str:
    """A picture as wide as the page, or as its figure where that is smaller.

    Args:
        figure: what to show.
        titles: for parts of it, by their id, what browsers show under the mouse; in an `img` they would not.
        alt: says what it shows where it is not seen.
    """
    width, height = figure.get_size_inches()
    style = f"max-width: {width:.1f}in; aspect-ratio: {width:.1f} / {height:.1f}"
    svg = _svg(figure)
    for part, title in (titles or {}).items():
        svg = svg.replace(f'<g id="{part}">', f'<g id="{part}"><title>{escape(title)}</title>', 1)
    svg = _SIZE.sub("", svg, count=1)  # it fills what holds it
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    if titles:
        return f'<div class=wide><embed title="{escape(alt)}" style="{style}" src="{source}"></div>'
    return f'<div class=wide><img alt="{escape(alt)}" style="{style}" src="{source}"></div>'


def _svg(figure: Figure) -> str:
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "bitsfusion"}):  # the same page for the same analysis
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue().decode("utf-8")
