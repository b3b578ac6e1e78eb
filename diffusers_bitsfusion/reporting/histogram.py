"""The recipe as an image: how many layers and what share of the weights have how many bits."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from ..codec.grid import levels

# Pixels of the image's width, a row's height and the margins.
_WIDTH = 760
_ROW = 30
_MARGIN = 14
# Pixels from the left edge to the bars, and of the longest bar.
_BARS = 150
_MAX_BAR = 380
# Pixels of letters.
_FONT_SIZE = 16
# Colours of text, of secondary text and of bars.
_INK, _PALE, _BAR = "#24292f", "#6e7781", "#4c78a8"


def draw_histogram(histogram: Mapping[int, tuple[int, int]], title: str) -> Image.Image:
    """Plot a bar for each number of bits, as long as its share of the weights.

    Args:
        histogram: bits to (layers, weights), as in `SizeReport`.
        title: written above.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    total = sum(weights for _, weights in histogram.values())
    largest = max(weights for _, weights in histogram.values())
    image = Image.new("RGB", (_WIDTH, _ROW * (len(histogram) + 1) + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN), title, _INK, font)
    for row, (bits, (layers, weights)) in enumerate(sorted(histogram.items()), start=1):
        top = _MARGIN + row * _ROW
        end = _BARS + max(2, round(_MAX_BAR * weights / largest))
        draw.text((_MARGIN, top + 4), f"{bits} bit, {levels(bits)} levels", _INK, font)
        draw.rectangle((_BARS, top + 4, end, top + _ROW - 6), _BAR)
        draw.text((end + 8, top + 4), f"{weights / total:.1%}, {layers} layers", _PALE, font)
    return image
