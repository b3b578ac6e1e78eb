"""The picture of a recipe: bars as long as the shares of the weights."""

from __future__ import annotations

import numpy as np

from diffusers_bitsfusion.reporting.histogram import _BAR, draw_histogram


def bar_lengths(image) -> list[int]:
    """Lengths in pixels of the bars, from top to bottom."""
    color = tuple(int(_BAR[i : i + 2], 16) for i in (1, 3, 5))
    rows = (np.asarray(image) == color).all(axis=2).sum(axis=1)
    starts = np.flatnonzero((rows > 0) & (np.roll(rows, 1) == 0))
    return [int(rows[start]) for start in starts]


def test_bars_are_as_long_as_the_weights_are_many():
    lengths = bar_lengths(draw_histogram({8: (2, 100), 1: (66, 600), 2: (59, 300)}, "unet"))
    assert len(lengths) == 3
    one, two, eight = lengths
    assert abs(one / two - 2) < 0.02 and abs(one / eight - 6) < 0.2


def test_a_bar_can_be_seen_however_few_the_weights():
    assert min(bar_lengths(draw_histogram({1: (1, 10**9), 8: (1, 1)}, "unet"))) >= 2


def test_the_picture_holds_every_row_and_all_of_the_text():
    image = np.asarray(draw_histogram({bits: (999, 10**8) for bits in range(1, 9)}, "a title " * 3))
    assert (image[:, -8:] == 255).all() and (image[-8:] == 255).all()
    assert len(bar_lengths(draw_histogram({bits: (999, 10**8) for bits in range(1, 9)}, ""))) == 8
