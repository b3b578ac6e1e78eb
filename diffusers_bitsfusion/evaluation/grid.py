"""A labelled grid of images: rows are prompts, columns are models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LEAST_CELL = 192  # pixels; smaller pictures are enlarged by a whole factor
_LABEL_WIDTH = 220
_MARGIN = 8
_FONT_SIZE = 16
_LINE = 20

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def image_grid(columns: Sequence[np.ndarray], column_labels: Sequence[str], row_labels: Sequence[str]) -> Image.Image:
    """Put images side by side under the names of their models and beside their prompts.

    Args:
        columns: for each model (rows, height, width, 3) uint8; sizes may differ between models.
        column_labels: a name for each model.
        row_labels: a prompt for each row.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    cells = [[_enlarged(image) for image in column] for column in columns]
    widths = [column[0].width for column in cells]
    height = max(column[0].height for column in cells)
    titles = [_wrap(label, font, width) for label, width in zip(column_labels, widths, strict=True)]
    top = _MARGIN + _LINE * max(map(len, titles))
    size = (
        _LABEL_WIDTH + sum(widths) + _MARGIN * (len(widths) + 2),
        top + (height + _MARGIN) * len(row_labels) + _MARGIN,
    )
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    tops = [top + _MARGIN + row * (height + _MARGIN) for row in range(len(row_labels))]
    for y, label in zip(tops, row_labels, strict=True):
        _write(draw, (_MARGIN, y), _wrap(label, font, _LABEL_WIDTH)[: height // _LINE], font)
    x = _LABEL_WIDTH + 2 * _MARGIN
    for column, title, width in zip(cells, titles, widths, strict=True):
        _write(draw, (x, _MARGIN), title, font)
        for y, cell in zip(tops, column, strict=True):
            grid.paste(cell, (x, y))
        x += width + _MARGIN
    return grid


def distinct_labels(paths: Sequence[str]) -> list[str]:
    """Return the last parts of the paths, as many as tell them apart."""
    parts = [Path(path).parts or (path,) for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return list(paths)


def _enlarged(image: np.ndarray) -> Image.Image:
    height, width = image.shape[:2]
    factor = max(1, -(-_LEAST_CELL // width))
    return Image.fromarray(image).resize((factor * width, factor * height), Image.Resampling.NEAREST)


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Return lines no wider than `width`, broken at spaces, and within a word that is wider than a line."""
    lines = []
    while text:
        end = 1
        while end < len(text) and font.getlength(text[: end + 1]) <= width:
            end += 1
        space = text.rfind(" ", 0, end + 1)
        if end < len(text) and space > 0:
            end = space
        lines.append(text[:end])
        text = text[end:].lstrip()
    return lines


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], font: Font) -> None:
    x, y = corner
    for number, line in enumerate(lines):
        draw.text((x, y + number * _LINE), line, fill="black", font=font)
