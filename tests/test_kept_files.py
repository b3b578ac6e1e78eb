"""Files of earlier versions load to the weights that were written, and runs go on from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from kept_files import HASHES, read

KEPT = sorted((Path(__file__).parent / "data").iterdir())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_every_kind_of_file_is_read_as_it_was_written(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")  # Reading a calibration locks its folder.
    assert read(tmp_path / "copy") == json.loads((folder / HASHES).read_text())


def test_there_are_files_and_they_are_small():
    assert KEPT
    assert sum(file.stat().st_size for folder in KEPT for file in folder.rglob("*") if file.is_file()) < 360_000
