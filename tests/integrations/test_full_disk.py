"""A disk that becomes full while a model or pipeline is saved: what was there stays whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers import assert_same_tensors
from hub_server import content
from tiny import tiny_unet

from diffusers_bitsfusion import quantize_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def full_disk(monkeypatch):
    """Makes the n-th weight file fail after a few bytes."""

    def fill(after: int = 0) -> None:
        real, calls = safetensors.torch.save_file, []

        def save_file(tensors, filename, metadata=None):
            calls.append(filename)
            if len(calls) > after:
                Path(filename).write_bytes(b"half a file")
                raise OSError(28, "No space left on device")
            return real(tensors, filename, metadata)

        monkeypatch.setattr(safetensors.torch, "save_file", save_file)

    return fill


@pytest.mark.parametrize(("shard_size", "after"), [("10GB", 0), ("60KB", 0), ("60KB", 2)])
def test_a_full_disk_leaves_the_old_model_as_it_was(packed_unet, tmp_path, full_disk, make_config, shard_size, after):
    packed_unet.save_pretrained(tmp_path)
    before, entries = content(tmp_path), sorted(os.listdir(tmp_path))
    other = quantize_model(tiny_unet(seed=1), make_config(), progress=False)
    full_disk(after)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert content(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == entries
    assert_same_tensors(UNet2DConditionModel.from_pretrained(tmp_path), packed_unet)


def test_a_full_disk_leaves_the_old_pipeline_as_it_was(packed_folders, tmp_path, full_disk):
    StableDiffusionPipeline.from_pretrained(packed_folders["keep"]).save_pretrained(tmp_path)
    before, entries = content(tmp_path), sorted(os.listdir(tmp_path))
    other = StableDiffusionPipeline.from_pretrained(packed_folders["table"])
    full_disk()
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(tmp_path)
    assert content(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == entries


def test_a_disk_found_full_at_the_flush_leaves_the_old_model_as_it_was(
    packed_unet, tmp_path, monkeypatch, make_config
):
    packed_unet.save_pretrained(tmp_path)
    before = content(tmp_path)

    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        quantize_model(tiny_unet(seed=1), make_config(), progress=False).save_pretrained(tmp_path)
    assert content(tmp_path) == before


def test_a_first_save_that_fails_leaves_no_files(packed_unet, tmp_path, full_disk):
    full_disk()
    with pytest.raises(OSError, match="No space left"):
        packed_unet.save_pretrained(tmp_path / "new")
    assert content(tmp_path) == {}
