"""Whole pictures of a small pipeline, by the workers of the benchmark."""

from __future__ import annotations

import pytest

from benchmarks import pictures

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    work = tmp_path_factory.mktemp("pictures")
    pictures.build_plain(work / "plain", tiny=True)
    pictures.build_packed(work / "plain", work / "packed")
    return work


@pytest.mark.parametrize("name", ["torch", "bitsfusion exact", "bitsfusion int8"])
def test_a_contestant_draws_and_is_measured(folders, name):
    folder, _ = pictures.CONTESTANTS[name]
    drawn = pictures.draw(name, folders / folder, "float32", steps=2, repeats=2)
    assert len(drawn["seconds"]) == 2 and min(drawn["seconds"]) > 0 and drawn["peak_bytes"] > 50e6
    assert pictures.folder_bytes(folders / "packed") < pictures.folder_bytes(folders / "plain")
