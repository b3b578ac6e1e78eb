"""Small files that claim, expand to or call for much memory are refused before any of it is taken."""

from __future__ import annotations

import copy
import os
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from fresh_process import FreshProcess
from hostile_files import CALIBRATION, LINES, RECIPE, frame, zeros

from diffusers_bitsfusion import Recipe
from diffusers_bitsfusion.analysis.results import Analysis
from diffusers_bitsfusion.calibration.folder import using_alone
from diffusers_bitsfusion.codec.entropy import check_frame, compress, decompress
from diffusers_bitsfusion.integrations.folder_commit import finish_saves
from diffusers_bitsfusion.utils.errors import DamagedFileError, shown
from diffusers_bitsfusion.utils.files import write_atomically
from diffusers_bitsfusion.utils.json_files import read_json
from diffusers_bitsfusion.utils.torch_files import check_archive, read_torch, tensors_of

PEAK_MEMORY = Path(__file__).with_name("peak_memory.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the processes that are measured")
def test_no_refused_model_takes_much_more_memory_than_the_right_one():
    result = FreshProcess([PEAK_MEMORY, "inspect --verify, a frame"]).result()
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert "4 files, all refused" in result.stdout


@pytest.mark.parametrize("name", sorted(name for name in CALIBRATION if name.startswith("state.pt")))
def test_a_file_of_torch_that_calls_for_memory_is_refused(tmp_path, name):
    torch.save({"step": 2}, tmp_path / "state.pt")
    CALIBRATION[name](tmp_path)
    with pytest.raises(DamagedFileError, match=r"state\.pt is damaged.* (it calls|larger than its data|too often)"):
        read_torch(tmp_path / "state.pt", "Delete it.")


def test_a_file_of_torch_may_hold_one_list_twice_but_no_list_in_itself(tmp_path):
    shared: list[object] = [torch.zeros(2)]
    torch.save({"a": shared, "b": [shared, shared]}, tmp_path / "state.pt")
    assert len(tensors_of(read_torch(tmp_path / "state.pt", ""))) == 1
    shared.append({"again": shared})
    torch.save({"a": shared}, tmp_path / "state.pt")
    with pytest.raises(DamagedFileError, match="holds itself"):
        read_torch(tmp_path / "state.pt", "Delete it.")


def test_records_of_the_same_bytes_are_refused(tmp_path):
    """A directory of 65,000 records of one megabyte each would be read for hours."""
    file = tmp_path / "state.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data", bytes(1000))
        first = archive.infolist()[0]
        for number in range(1, 10):
            again = copy.copy(first)
            again.filename = f"data{number}"
            archive.filelist.append(again)
    with pytest.raises(DamagedFileError, match="records have the same bytes"):
        check_archive(file, "")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no such files")
def test_what_has_no_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        with pytest.raises(DamagedFileError, match=f"{name} is no regular file"):
            read_json(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="links need rights on Windows")
def test_links_in_a_folder_of_a_stranger_lead_nowhere(tmp_path):
    """What is beside the folder is neither written, moved nor removed."""
    folder, beside = tmp_path / "folder", tmp_path / "beside"
    for place in (folder, beside):
        place.mkdir()
    (beside / "config.json").write_text("{}")
    (folder / ".saving-a").symlink_to(beside)
    (folder / ".x.json.part").symlink_to(beside / "config.json")
    (folder / "calibration").mkdir()
    (folder / "calibration" / ".0.lock-owner").symlink_to(beside / "config.json")
    assert finish_saves(folder) == 0
    write_atomically(folder / "x.json", "new")
    with using_alone(folder / "calibration", 0):
        pass
    save = folder / ".saving-b"
    save.mkdir()
    (save / "commit.json").write_text('{"files": ["config.json"]}')
    (save / "files").symlink_to(beside)
    with pytest.raises(DamagedFileError, match="holds links to other files"):
        finish_saves(folder)
    assert [file.name for file in beside.iterdir()] == ["config.json"]
    assert (beside / "config.json").read_text() == "{}"
    assert (folder / "x.json").read_text() == "new"


@pytest.mark.parametrize("name", sorted(RECIPE))
def test_a_large_recipe_is_refused(tmp_path, name):
    RECIPE[name](tmp_path)
    with pytest.raises(DamagedFileError, match=r"recipe\.json has \d+ bytes; at most \d+ are expected|has more than"):
        Recipe.load(tmp_path)


@pytest.mark.parametrize("name", sorted(LINES))
def test_a_large_line_is_refused(tmp_path, name):
    LINES[name](tmp_path)
    with pytest.raises(DamagedFileError, match=r"analysis\.jsonl, line 1 has more than"):
        Analysis.load(tmp_path)


def test_a_frame_is_checked_without_its_content():
    codes = torch.randint(0, 9, (3, 1 << 20), dtype=torch.uint8)
    sound = compress(codes)
    check_frame(sound, codes.numel(), largest=8)
    with pytest.raises(ValueError, match="bytes that its codes never have"):
        check_frame(sound, codes.numel(), largest=7)
    for size in (0, codes.numel() - 1, codes.numel() + 1):
        with pytest.raises(ValueError, match="bytes where"):
            check_frame(sound, size)


def test_a_frame_with_anything_changed_is_refused_as_when_it_is_decompressed():
    codes = torch.randint(0, 9, (300_000,), dtype=torch.uint8)
    sound = compress(codes)
    changed = [sound[:-1], sound[:100], sound[:-4], torch.cat([sound, sound]), torch.cat([sound, sound[:1]])]
    for place in (4, 6, 9, 12, 13, 500, sound.numel() // 2, sound.numel() - 1):
        flipped = sound.clone()
        flipped[place] ^= 4
        changed.append(flipped)
    for wrong in changed:
        for check in (check_frame, decompress):
            with pytest.raises(ValueError, match=r"is damaged|bytes where"):
                check(wrong.clone(), codes.numel())


def test_a_frame_of_gigabytes_with_a_checksum_that_fits_is_refused_by_its_size(packed_unet, tmp_path):
    packed_unet.save_pretrained(tmp_path)
    frame(zeros(1 << 30, True))(tmp_path)
    with pytest.raises(ValueError, match=r"codes holds 1073741824 bytes where \d+ are expected"):
        UNet2DConditionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [str, list, dict])
def test_a_value_is_shown_without_its_whole(kind):
    value = {str: "x" * 10**7, list: [1] * 10**7, dict: dict.fromkeys(range(10**6), "y")}[kind]
    text = shown(value)
    assert len(text) <= 201 and text.endswith("…") and repr(value).startswith(text[:150])


@pytest.mark.parametrize("value", ["a", 'it\'s "b"', [1, ("x",), ()], {"a": [None, True], 2: {}}, (1.5,), [], {}])
def test_a_short_value_is_shown_as_python_does(value):
    assert shown(value) == repr(value)
