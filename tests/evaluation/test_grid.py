from __future__ import annotations

import numpy as np
import pytest

from diffusers_bitsfusion.evaluation import image_grid
from diffusers_bitsfusion.evaluation.grid import distinct_labels

COLORS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]], [[0, 255, 255], [255, 0, 255]]], np.uint8)


def _solid(color: np.ndarray, side: int) -> np.ndarray:
    return np.broadcast_to(color, (side, side, 3))


def test_pictures_stand_in_columns_by_model_and_rows_by_prompt():
    sides = (16, 64, 200)
    columns = [np.stack([_solid(color, side) for color in pair]) for pair, side in zip(COLORS, sides, strict=True)]
    grid = np.asarray(image_grid(columns, ["first", "second", "third"], ["one", "two"]))
    centres = np.full((3, 2, 2), -1.0)
    for column, row in np.ndindex(3, 2):
        rows, cols = np.nonzero((grid == COLORS[column, row]).all(-1))
        assert len(rows) == ((192, 192, 200)[column]) ** 2
        centres[column, row] = rows.mean(), cols.mean()
    assert (np.diff(centres[..., 1], axis=0) > 190).all()
    assert (np.diff(centres[..., 0], axis=1) > 190).all()


def test_labels_are_drawn_beside_and_above_and_inside_their_room():
    column = np.full((1, 64, 64, 3), 200, np.uint8)
    grid = np.asarray(image_grid([column], ["a model with a long name " * 2], ["word " * 200 + "x" * 100]))
    dark = (grid < 100).all(-1)
    top, left = (np.nonzero((grid == 200).all(-1))[axis].min() for axis in (0, 1))
    bottom = np.nonzero((grid == 200).all(-1))[0].max()
    assert dark[:top, left:].any() and dark[top:, :left].any()
    assert not dark[:, left - 4 : left].any() and not dark[top - 4 : top].any() and not dark[bottom + 1 :].any()


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["runs/a", "runs/b/"], ["a", "b"]),
        (["x/pipeline", "y/pipeline"], ["x/pipeline", "y/pipeline"]),
        (["x/1/p", "x/2/p", "q"], ["1/p", "2/p", "q"]),
        (["same", "same"], ["same", "same"]),
    ],
)
def test_models_are_named_by_as_little_of_their_path_as_tells_them_apart(paths, labels):
    assert distinct_labels(paths) == labels
