"""Draws scenes in two independent ways: hard pixels for training, polygons with soft edges to test the scorer with."""

import random
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .scenes import BACKGROUND, COLORS, IMAGE_SIZE, SceneObject


def render(scene: tuple[SceneObject, ...]) -> np.ndarray:
    """The training style: a pixel is in a shape if its centre is. Returns (64, 64, 3) uint8."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    image[:] = BACKGROUND
    for item in scene:
        reach = int(item.radius)
        top, left = int(item.y) - reach, int(item.x) - reach
        window = image[top : top + 2 * reach + 1, left : left + 2 * reach + 1]
        window[shape_mask(item.shape, reach)] = item.rgb or COLORS[item.color]
    return image


@cache
def shape_mask(shape: str, radius: int) -> np.ndarray:
    """Pixels of a shape centred in a (2 radius + 1)² square. Returns bool."""
    v, u = np.mgrid[-radius : radius + 1, -radius : radius + 1] / (radius + 0.25)
    return _INSIDE[shape](u, v)


def _star(u, v):
    # Each line of a pentagram cuts one point off; what lies beyond two of the lines is outside the star.
    angles = -np.pi / 2 + 2 * np.pi * np.arange(5) / 5
    beyond = sum((u * np.cos(a) + v * np.sin(a) > 0.36).astype(int) for a in angles)
    return (beyond <= 1) & (u**2 + v**2 <= 1)


def _heart(u, v):
    lobes = (np.abs(u) - 0.48) ** 2 + (v + 0.35) ** 2 <= 0.52**2
    point = (v >= -0.25) & (np.abs(u) <= 1.02 * (1 - v) / 1.25)
    return lobes | point


_INSIDE = {
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.9,
    "triangle": lambda u, v: (np.abs(u) <= (v + 1) / 1.8) & (v <= 0.8),
    "diamond": lambda u, v: np.abs(u) + np.abs(v) <= 1,
    "cross": lambda u, v: np.minimum(np.abs(u), np.abs(v)) <= 0.32,
    "star": _star,
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.5**2),
    "heart": _heart,
}


def render_soft(scene: tuple[SceneObject, ...], rng: random.Random) -> np.ndarray:
    """A second style that shares no code with `render`: four-fold supersampled polygons with soft edges, every
    colour channel off by up to 10 %, a slight Gaussian blur. Returns (64, 64, 3) uint8.
    """
    scale = 4
    canvas = Image.new("RGB", (IMAGE_SIZE * scale,) * 2, _vary(rng, BACKGROUND))
    draw = ImageDraw.Draw(canvas)
    background = canvas.getpixel((0, 0))
    for item in scene:
        fill = _vary(rng, COLORS[item.color])
        x, y, r = (item.x + 0.5) * scale, (item.y + 0.5) * scale, item.radius * scale
        if item.shape in ("circle", "ring"):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
            if item.shape == "ring":
                draw.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=background)
        else:
            draw.polygon([(x + r * u, y + r * v) for u, v in _outline(item.shape)], fill=fill)
    small = canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(small.filter(ImageFilter.GaussianBlur(0.4)))


def _vary(rng, color):
    return tuple(min(255, round(channel * rng.uniform(0.9, 1.1))) for channel in color)


def _outline(shape):
    """Corners of a shape in the square [-1, 1]², v downwards."""
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if shape == "triangle":
        return [(0, -1), (1, 0.8), (-1, 0.8)]
    if shape == "diamond":
        return [(0, -1), (1, 0), (0, 1), (-1, 0)]
    if shape == "cross":
        a = 0.33
        return [
            (-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a),
            (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a),
        ]  # fmt: skip
    if shape == "star":
        turns = np.arange(10) * np.pi / 5
        reach = np.where(np.arange(10) % 2, 0.45, 1.0)
        return list(zip(reach * np.sin(turns), -reach * np.cos(turns), strict=True))
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 60)
        v = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return list(zip(np.sin(t) ** 3, -(v + 2.5) / 14.5, strict=True))
    raise ValueError(f"unknown shape {shape!r}")
