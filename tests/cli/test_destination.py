"""What `bitsfusion quantize` refuses to write over, before it loads anything; and what `inspect` verifies."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hub_server import content
from safetensors.torch import load_file, save_file
from tiny import tiny_unet
from typer.testing import CliRunner

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.cli import app

WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def source(source_folder, tmp_path) -> Path:
    return Path(shutil.copytree(source_folder, tmp_path / "source"))


@pytest.mark.parametrize("name", ["source", "source/.", "link", "up/../source", "SOURCE-hard"])
def test_one_folder_under_two_names_is_refused_and_untouched(source, tmp_path, monkeypatch, name):
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "SOURCE-hard").symlink_to(os.path.relpath(source, tmp_path))
    (tmp_path / "up").mkdir()
    monkeypatch.chdir(tmp_path)
    before = content(source)
    for arguments in (("source", name), (name, "source"), (source, name)):
        code, output = run("quantize", *arguments)
        assert code == 1 and "SRC and DST are one folder" in output
    assert content(source) == before


@pytest.mark.parametrize("pair", [("source", "source/unet"), ("source/unet", "source"), ("source", "source/new/deep")])
def test_a_folder_within_the_other_is_refused(source, tmp_path, monkeypatch, pair):
    monkeypatch.chdir(tmp_path)
    before = content(source)
    code, output = run("quantize", *pair)
    assert code == 1 and "is within the other" in output
    assert content(source) == before


def test_an_original_in_the_destination_is_refused(source, source_folder, tmp_path):
    before = content(source)
    code, output = run("quantize", source_folder, source)
    assert code == 1 and "holds a model that is not quantized" in output
    assert content(source) == before


@pytest.mark.parametrize("calibrate", [[], ["--calibrate", "--samples", "2", "--steps", "2"]])
def test_a_destination_that_cannot_be_a_folder_is_refused_before_the_work(source, tmp_path, monkeypatch, calibrate):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    for destination in (tmp_path / "file", tmp_path / "file" / "within"):
        code, output = run("quantize", source, destination, *calibrate)
        assert code == 1 and "file is a file: choose another DST" in output


def packed(folder: Path, **options) -> Path:
    unet = quantize_model(tiny_unet(), BitsFusionConfig(recipe=2, time_embedding="table"), progress=False)
    unet.save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "60KB"}])
def test_inspect_verifies_a_sound_folder(tmp_path, options):
    packed(tmp_path, **options)
    code, output = run("inspect", tmp_path, "--verify")
    assert code == 0 and "every checksum fits" in output
    code, output = run("inspect", tmp_path, "--verify", "--json")
    assert code == 0 and json.loads(output)[""]["checksums"] is True
    assert "checksums: of every tensor" in run("inspect", tmp_path)[1]


def test_a_file_without_checksums_is_sound_and_said_to_have_none(tmp_path):
    packed(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, {"format": "pt"})
    code, output = run("inspect", tmp_path, "--verify")
    assert code == 0 and "no checksums" in output
    assert "checksums: none" in run("inspect", tmp_path)[1]


def test_inspect_names_what_is_damaged(tmp_path):
    packed(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for damaged, problem in (
        (whole[:-100], "is cut short"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "its checksum fits neither"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "Git-LFS pointer"),
        (b"<!doctype html><html>", "is a web page"),
        (b"", "is no safetensors file, or cut short"),
    ):
        (tmp_path / WEIGHTS).write_bytes(damaged)
        code, output = run("inspect", tmp_path, "--verify")
        assert code == 1 and WEIGHTS in output and problem in output, output
