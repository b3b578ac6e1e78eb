"""Imports lead downwards, by the floors that docs/ARCHITECTURE.md draws."""

from __future__ import annotations

import architecture


def test_every_room_stands_on_a_floor():
    drawn, built = set(architecture.floors()), {room for arrow in architecture.arrows() for room in arrow}
    assert drawn == built


def test_no_arrow_climbs():
    found = architecture.arrows()
    assert {arrow: found[arrow] for arrow in architecture.climbing()} == {}


def test_no_files_import_each_other_in_a_circle():
    assert architecture.circles(architecture.arrows_of_files()) == []


def test_an_arrow_that_climbs_is_found(tmp_path, monkeypatch):
    (tmp_path / "ops").mkdir()
    (tmp_path / "nn").mkdir()
    (tmp_path / "ops" / "decode.py").write_text("def f():\n    from ..nn.packed import PackedWeight\n")
    (tmp_path / "nn" / "packed.py").write_text("from ..ops import decode\n")
    monkeypatch.setattr(architecture, "PACKAGE", tmp_path)
    assert architecture.climbing() == [("ops", "nn")]
    assert architecture.circles(architecture.arrows()) == [["nn", "ops"]]
    assert architecture.circles(architecture.arrows_of_files()) == [["nn.packed", "ops.decode"]]


def test_files_beside_the_folders():
    beside = [file.name for file in architecture.PACKAGE.iterdir() if file.is_file()]
    assert len(beside) <= 5, beside


def test_a_config_is_followed_to_the_packed_layer_in_few_stops():
    stops, called = architecture.stops()
    assert stops[0] == "quantize.py:quantize_model" and stops[-1].startswith("packing/packer.py:ModelPacker.")
    assert "packing/planning.py:make_plan" in stops and len(set(stops)) == len(stops) < called
    assert len(stops) <= 25


def test_the_page_names_every_file():
    page = architecture.PAGE.read_text(encoding="utf-8")
    missing = [
        file.name
        for file in architecture.files()
        if file.name not in ("__init__.py", "__main__.py")
        and "triton" not in file.parts
        and "cli" not in file.parts
        and f"`{file.name}`" not in page
    ]
    assert missing == []
