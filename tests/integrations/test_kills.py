"""A save that is killed leaves the old files, the new ones, or a folder that loading refuses with the way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_unet

from diffusers_bitsfusion import BitsFusionConfig, quantize_model, size_report
from diffusers_bitsfusion.integrations.folder_commit import PREFIX, finish_saves, private_folder, repair, replacing
from diffusers_bitsfusion.utils.errors import UnfinishedSaveError

KILLS = Path(__file__).resolve().parent.parent / "kills.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the processes that are killed")
def test_no_kill_leaves_a_mixture_or_leftovers():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, KILLS, "9"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if " kills: " in line]
    assert len(lines) == 7
    for outcome in ("'old'", "'new'", "'refused'"):
        assert outcome in result.stdout


def test_a_save_under_way_is_left_alone(tmp_path):
    with private_folder(tmp_path) as scratch:
        (scratch / "half").write_text("x")
        assert finish_saves(tmp_path) == 0
        with replacing(tmp_path) as files:
            (files / "a.txt").write_text("new")
        assert (scratch / "half").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_leftover_of_an_earlier_version_goes(tmp_path):
    left = tmp_path / f"{PREFIX}abcdefgh"
    left.mkdir()
    (left / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / f"{PREFIX}empty").mkdir()
    with replacing(tmp_path) as files:
        (files / "a.txt").write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_save_whose_rest_is_gone_says_to_save_again(tmp_path):
    unet = quantize_model(tiny_unet(), BitsFusionConfig(recipe=2), progress=False)
    unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsfusion", "unfinished_save": str(tmp_path)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnfinishedSaveError, match=f"bitsfusion inspect '{tmp_path}' --repair"):
        size_report(tmp_path)
    with pytest.raises(UnfinishedSaveError, match="save the model again"):
        repair(tmp_path)
    unet.save_pretrained(tmp_path)
    assert repair(tmp_path) == 0
    size_report(tmp_path)


def test_a_disk_that_is_full_while_files_move_says_how_to_go_on(tmp_path, monkeypatch):
    real = os.replace

    def replace(source, target):
        if Path(target) == tmp_path / "b.txt":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match=r"Could not finish saving .*No space left.*--repair"):
        with replacing(tmp_path) as files:
            for name in ("a.txt", "b.txt"):
                (files / name).write_text("new")
    monkeypatch.undo()
    assert (tmp_path / "a.txt").exists() and not (tmp_path / "b.txt").exists()
    assert repair(tmp_path) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "b.txt"]
