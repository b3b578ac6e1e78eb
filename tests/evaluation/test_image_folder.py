from __future__ import annotations

import numpy as np
import pytest

from diffusers_bitsfusion.evaluation.image_folder import ImageFolder


def test_pictures_come_back_exactly(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    ImageFolder(tmp_path / "a" / "b", {"steps": 1}).save(3, image)
    folder = ImageFolder(tmp_path / "a" / "b", {"steps": 1})
    assert (folder.load(3) == image).all() and folder.load(4) is None
    assert sorted(file.name for file in folder.folder.iterdir()) == ["00003.png", "settings.json"]


def test_pictures_of_other_settings_are_refused(tmp_path):
    ImageFolder(tmp_path, {"steps": 1, "seed": 1})
    with pytest.raises(ValueError, match=r"another run \(other scale, steps\)"):
        ImageFolder(tmp_path, {"steps": 2, "seed": 1, "scale": 3})


def test_folders_with_something_else_are_refused(tmp_path):
    (tmp_path / "00000.png").touch()
    with pytest.raises(ValueError, match="is not empty"):
        ImageFolder(tmp_path, {})
