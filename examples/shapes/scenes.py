"""Scenes of coloured shapes: what a prompt asks for, how a scene that fits it is placed, when the two agree.

The six prompt categories carry GenEval's names. An object of a prompt leaves open what the caption does not say
(`color` or `size` is None); a scene's objects have everything.
"""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import permutations

IMAGE_SIZE = 64
BACKGROUND = (224, 224, 224)
COLORS = {
    "red": (215, 45, 45),
    "green": (45, 155, 65),
    "blue": (45, 85, 215),
    "yellow": (240, 205, 40),
    "orange": (240, 125, 25),
    "purple": (130, 50, 175),
    "cyan": (40, 190, 205),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "heart")
RADII = {"small": (6, 7), "large": (10, 11)}
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNTS = (2, 3, 4, 5, 6)

# Neither drawn nor named in training: one colour for each shape, and six of the 28 pairs of shapes.
HELD_OUT_COLORS = frozenset((color, SHAPES[(3 * index + 1) % len(SHAPES)]) for index, color in enumerate(COLORS))
HELD_OUT_PAIRS = frozenset(
    frozenset(pair)
    for pair in (
        ("circle", "star"),
        ("square", "ring"),
        ("triangle", "heart"),
        ("diamond", "cross"),
        ("circle", "triangle"),
        ("square", "star"),
    )
)
_MARGIN = 3  # pixels between two objects, and half of it to the image's edge
_RELATION_MARGIN = 8  # pixels from the image's middle: of two objects in a relation each lies in its own half
# Counted objects lie as on the faces of a die: (column, row) of a grid of three by three.
_FACES = {
    2: ((0, 0), (2, 2)),
    3: ((0, 0), (1, 1), (2, 2)),
    4: ((0, 0), (2, 0), (0, 2), (2, 2)),
    5: ((0, 0), (2, 0), (1, 1), (0, 2), (2, 2)),
    6: ((0, 0), (2, 0), (0, 1), (2, 1), (0, 2), (2, 2)),
}
_FACE_CELL, _FACE_JITTER = 19, 3  # pixels
_COLOR_CONTRAST = 75  # least difference of a free colour from the background, in the channel that differs most


@dataclass(frozen=True)
class ObjectSpec:
    """One object that a prompt asks for; None leaves the attribute open."""

    shape: str
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class PromptSpec:
    """Exactly these objects, and for two of them optionally how the first lies to the second."""

    category: str
    objects: tuple[ObjectSpec, ...]
    relation: str | None = None


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene: centre and radius (half of the longer side) in pixels.

    `rgb` is a shade of its own, `color` then the nearest of the palette.
    """

    shape: str
    color: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int] | None = None

    @property
    def size(self) -> str:
        return "small" if self.radius < 8 else "large"


def sample_spec(rng: random.Random, category: str, held_out: bool = False) -> PromptSpec:
    """Draw what a prompt of `category` asks for; `held_out` draws only what training never shows."""
    if category in ("single_object", "colors"):
        color, shape = _color_and_shape(rng, held_out and category == "colors")
        size = rng.choice((None, "small", "large"))
        return PromptSpec(category, (ObjectSpec(shape, color if category == "colors" else None, size),))
    if category == "counting":
        color, shape = _color_and_shape(rng, held_out)
        if not held_out and rng.random() < 0.3:
            color = None
        return PromptSpec(category, (ObjectSpec(shape, color),) * rng.choice(COUNTS))
    first, second = _pair(rng, held_out)
    if category == "position":
        return PromptSpec(category, (ObjectSpec(first), ObjectSpec(second)), rng.choice(RELATIONS))
    if category == "two_object":
        sizes = [rng.choice((None, None, "small", "large")) for _ in range(2)]
        return PromptSpec(category, (ObjectSpec(first, size=sizes[0]), ObjectSpec(second, size=sizes[1])))
    if category == "color_attr":
        colors = _two_colors(rng, first, second)
        return PromptSpec(category, (ObjectSpec(first, colors[0]), ObjectSpec(second, colors[1])))
    raise ValueError(f"unknown category {category!r}; choose one of {', '.join(CATEGORIES)}")


def sample_scene(rng: random.Random, spec: PromptSpec) -> tuple[SceneObject, ...]:
    """Draw a scene that satisfies `spec`: open attributes at random, nothing overlapping."""
    while True:
        radii = [_radius(rng, spec, wanted) for wanted in spec.objects]
        centres = _place_as_on_a_die(rng, radii) if spec.category == "counting" else _place(rng, radii)
        if centres is not None and (spec.relation is None or _clearly_related(centres, spec.relation)):
            break
    colors = _fill_colors(rng, spec)
    return tuple(
        SceneObject(wanted.shape, color, x, y, radius)
        for wanted, color, (x, y), radius in zip(spec.objects, colors, centres, radii, strict=True)
    )


def sample_free_scene(rng: random.Random) -> tuple[SceneObject, ...]:
    """Draw a scene that no prompt asks for: one to six objects in any colours, half of the time all alike.

    Held-out pairs do not occur here either; a shade counts as the nearest colour.
    """
    radii, centres = [], None
    while centres is None:
        radii = [rng.choice(RADII[rng.choice(tuple(RADII))]) for _ in range(rng.randint(1, max(COUNTS)))]
        centres = _place(rng, radii)
    looks = [_free_look(rng)] * len(radii)
    if rng.random() < 0.5:
        looks = _free_looks(rng, len(radii))
    return tuple(
        SceneObject(shape, nearest_color(rgb), x, y, radius, rgb)
        for (shape, rgb), (x, y), radius in zip(looks, centres, radii, strict=True)
    )


def nearest_color(rgb: tuple[int, int, int]) -> str:
    """The palette's colour at the least Euclidean distance."""
    return min(COLORS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLORS[name], rgb, strict=True)))


def satisfies(scene: tuple[SceneObject, ...], spec: PromptSpec) -> bool:
    """Whether `scene` holds the objects of `spec` and nothing else, in the relation it asks for.

    This is GenEval's rule with its check of exact counts, there used for counting alone, applied to every category.
    """
    if Counter(found.shape for found in scene) != Counter(wanted.shape for wanted in spec.objects):
        return False
    return any(
        all(_fits(found, wanted) for found, wanted in zip(order, spec.objects, strict=True))
        and (spec.relation is None or related(order[0], order[1], spec.relation))
        for order in _orders(scene, spec)
    )


def related(first: SceneObject, second: SceneObject, relation: str) -> bool:
    """Whether `first` lies `relation` `second`: the larger of the two distances decides the axis."""
    dx, dy = first.x - second.x, first.y - second.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    sign = -1 if relation in ("left of", "above") else 1
    return sign * along > abs(across)


def _orders(scene, spec):
    # Objects of a counting prompt are all alike: one order stands for all 720.
    return (scene,) if len(set(spec.objects)) == 1 else permutations(scene)


def _fits(found: SceneObject, wanted: ObjectSpec) -> bool:
    return found.shape == wanted.shape and wanted.color in (None, found.color) and wanted.size in (None, found.size)


def _color_and_shape(rng, held_out):
    pairs = [(c, s) for c in COLORS for s in SHAPES if ((c, s) in HELD_OUT_COLORS) == held_out]
    return rng.choice(pairs)


def _pair(rng, held_out):
    pairs = [p for p in permutations(SHAPES, 2) if (frozenset(p) in HELD_OUT_PAIRS) == held_out]
    return rng.choice(pairs)


def _allowed_colors(shape):
    return [color for color in COLORS if (color, shape) not in HELD_OUT_COLORS]


def _two_colors(rng, first, second):
    color = rng.choice(_allowed_colors(first))
    return color, rng.choice([other for other in _allowed_colors(second) if other != color])


def _fill_colors(rng, spec):
    if spec.category == "counting":
        color = spec.objects[0].color or rng.choice(_allowed_colors(spec.objects[0].shape))
        return [color] * len(spec.objects)
    return [wanted.color or rng.choice(_allowed_colors(wanted.shape)) for wanted in spec.objects]


def _free_looks(rng, n):
    while True:
        looks = [_free_look(rng) for _ in range(n)]
        shapes = {shape for shape, _ in looks}
        if not any(pair <= shapes for pair in HELD_OUT_PAIRS):
            return looks


def _free_look(rng):
    """(shape, rgb)"""
    shape = rng.choice(SHAPES)
    while True:
        rgb = tuple(rng.randrange(256) for _ in range(3))
        contrast = max(abs(a - b) for a, b in zip(rgb, BACKGROUND, strict=True))
        if contrast >= _COLOR_CONTRAST and (nearest_color(rgb), shape) not in HELD_OUT_COLORS:
            return shape, rgb


def _radius(rng, spec, wanted):
    size = wanted.size or ("small" if spec.category == "counting" else rng.choice(tuple(RADII)))
    return rng.choice(RADII[size])


def _place(rng, radii):
    """Integer centres without overlap, or None where an object found no room."""
    centres: list[tuple[int, int]] = []
    for radius in radii:
        edge = radius + _MARGIN // 2
        for _ in range(100):
            x, y = rng.randint(edge, IMAGE_SIZE - 1 - edge), rng.randint(edge, IMAGE_SIZE - 1 - edge)
            if _has_room(x, y, radius, centres, radii):
                centres.append((x, y))
                break
        else:
            return None
    return centres


def _place_as_on_a_die(rng, radii):
    """The centres of a die's face, turned by a quarter half of the time, each moved a little; None if two overlap."""
    turned = rng.random() < 0.5
    centres: list[tuple[int, int]] = []
    for (column, row), radius in zip(_FACES[len(radii)], radii, strict=True):
        if turned:
            column, row = 2 - row, column
        x, y = (
            IMAGE_SIZE // 2 + _FACE_CELL * (place - 1) + rng.randint(-_FACE_JITTER, _FACE_JITTER)
            for place in (column, row)
        )
        if not _has_room(x, y, radius, centres, radii):
            return None
        centres.append((x, y))
    return centres


def _has_room(x, y, radius, centres, radii):
    return all(
        max(abs(x - ox), abs(y - oy)) >= radius + other + _MARGIN
        for (ox, oy), other in zip(centres, radii, strict=False)
    )


def _clearly_related(centres, relation):
    (x0, y0), (x1, y1) = centres
    first, second, across = (x0, x1, y0 - y1) if relation in ("left of", "right of") else (y0, y1, x0 - x1)
    low, high = (first, second) if relation in ("left of", "above") else (second, first)
    middle = IMAGE_SIZE // 2
    return low <= middle - _RELATION_MARGIN and high >= middle + _RELATION_MARGIN and high - low > 1.3 * abs(across)
