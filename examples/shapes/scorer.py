"""Judges images against prompts with no learned part.

Objects are the connected components that differ from the background; a component's colour is the nearest of the
palette, its shape the template that it overlaps best. What is neither noise nor a known object counts as an object
of unknown shape, so that a picture with leftovers fits no prompt.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from .render import shape_mask
from .scenes import COLORS, SHAPES, PromptSpec, SceneObject, satisfies

UNKNOWN = "unknown"
_CONTRAST = 60  # least difference from the background, of 255, in the channel that differs most
_SPECK = 12  # pixels below which a component is noise
_COLOR_DISTANCE = 60  # farthest from a colour of the palette
_OVERLAP = 0.72  # least intersection over union with a template
_GRID = 24  # side to which components are scaled for comparison
_EIGHT_NEIGHBOURS = np.ones((3, 3), bool)
_PALETTE = np.array(list(COLORS.values()), np.float32)


def score(images: Iterable[np.ndarray | Image.Image], specs: Sequence[PromptSpec]) -> list[bool]:
    """Whether each image shows exactly what its specification asks for. Images are (h, w, 3) uint8 or PIL."""
    return [satisfies(detect(image), spec) for image, spec in zip(images, specs, strict=True)]


def detect(image: np.ndarray | Image.Image) -> tuple[SceneObject, ...]:
    """The objects in one (h, w, 3) uint8 image."""
    pixels = np.asarray(image, np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    difference = pixels - np.median(border, axis=0)
    contrast = np.abs(difference).max(axis=-1)
    labels, _ = ndimage.label(contrast > _CONTRAST, _EIGHT_NEIGHBOURS)
    return tuple(
        _recognise(pixels, difference, contrast, labels == index, window)
        for index, window in enumerate(ndimage.find_objects(labels), start=1)
        if np.count_nonzero(labels[window] == index) >= _SPECK
    )


def _recognise(pixels, difference, contrast, component, window):
    rows, columns = (slice(max(0, part.start - 2), part.stop + 2) for part in window)
    inside = component[rows, columns]
    core = inside & (contrast[rows, columns] >= 0.8 * contrast[rows, columns][inside].max())
    color = _nearest_color(np.median(pixels[rows, columns][core], axis=0))
    toward = np.median(difference[rows, columns][core], axis=0)
    near = ndimage.binary_dilation(inside, _EIGHT_NEIGHBOURS)
    coverage = np.where(near, _coverage(difference[rows, columns], toward), 0)
    filled_rows, filled_columns = np.flatnonzero((coverage > 0.5).any(1)), np.flatnonzero((coverage > 0.5).any(0))
    top, bottom = filled_rows[0], filled_rows[-1] + 1
    left, right = filled_columns[0], filled_columns[-1] + 1
    return SceneObject(
        shape=_best_shape(coverage[top:bottom, left:right]) if color != UNKNOWN else UNKNOWN,
        color=color,
        x=columns.start + (left + right - 1) / 2,
        y=rows.start + (top + bottom - 1) / 2,
        radius=max(bottom - top, right - left) / 2,
    )


def _coverage(difference, toward):
    """The share of each pixel that a colour `toward` away from the background covers; 0 where another colour is."""
    share = difference @ toward / (toward @ toward)
    residual = np.linalg.norm(difference - share[..., None] * toward, axis=-1)
    return np.where(residual < _COLOR_DISTANCE, share.clip(0, 1), 0)


def _nearest_color(color):
    distances = np.linalg.norm(_PALETTE - color, axis=1)
    nearest = int(distances.argmin())
    return tuple(COLORS)[nearest] if distances[nearest] < _COLOR_DISTANCE else UNKNOWN


def _best_shape(coverage):
    names, templates = _templates()
    sample = _scaled(coverage)
    overlap = np.minimum(templates, sample).sum(1) / np.maximum(templates, sample).sum(1)
    best = int(overlap.argmax())
    return names[best] if overlap[best] >= _OVERLAP else UNKNOWN


def _scaled(coverage):
    """A crop of any size, made square and put on the grid of comparison, as a vector of `_GRID`² values."""
    height, width = coverage.shape
    side = max(height, width)
    square = np.zeros((side, side), np.float32)
    square[(side - height) // 2 :, (side - width) // 2 :][:height, :width] = coverage
    image = Image.fromarray(square)
    return np.asarray(image.resize((_GRID, _GRID), Image.Resampling.BILINEAR)).ravel()


@cache
def _templates():
    """Every shape at several sizes, with hard and with soft pixels: names, and (n, `_GRID`²) float32."""
    names, rows = [], []
    for shape in SHAPES:
        fine = Image.fromarray(shape_mask(shape, 48).astype(np.float32))
        for radius in range(5, 13):
            side = 2 * radius + 1
            soft = np.asarray(fine.resize((side, side), Image.Resampling.BOX))
            for template in (shape_mask(shape, radius).astype(np.float32), soft):
                filled = np.argwhere(template > 0.5)
                (top, left), (bottom, right) = filled.min(0), filled.max(0) + 1
                rows.append(_scaled(template[top:bottom, left:right]))
                names.append(shape)
    return names, np.stack(rows)
