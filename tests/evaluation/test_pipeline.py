from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_bitsfusion import BitsFusionLinear
from diffusers_bitsfusion.evaluation import load_pipeline
from diffusers_bitsfusion.utils.fingerprints import hash_of_folder


@pytest.fixture
def copy(source_folder, tmp_path) -> Path:
    return Path(shutil.copytree(source_folder, tmp_path / "copy"))


def test_packed_and_full_pipelines_load(source_folder, packed_folders):
    assert load_pipeline(source_folder).vae.dtype == torch.float32
    modules = load_pipeline(packed_folders["keep"]).unet.modules()
    assert any(isinstance(module, BitsFusionLinear) for module in modules)


def test_the_scheduler_is_replaced_and_the_safety_checker_taken_off(source_folder):
    pipeline = load_pipeline(source_folder, "DDIMScheduler")
    assert isinstance(pipeline.scheduler, DDIMScheduler) and pipeline.scheduler.config.beta_start == 0.00085
    assert pipeline.safety_checker is None
    with pytest.raises(ValueError, match="'UNet2DModel' is not a diffusers scheduler"):
        load_pipeline(source_folder, "UNet2DModel")


@pytest.mark.parametrize("entry", [None, [None, None]])
def test_a_pipeline_without_denoiser_is_refused(copy, entry):
    index = json.loads((copy / "model_index.json").read_text()) | {"unet": entry}
    (copy / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if v is not None}))
    with pytest.raises(ValueError, match="has neither a UNet nor a transformer"):
        load_pipeline(copy)


def test_a_pipeline_whose_unet_was_deleted_is_refused(copy):
    shutil.rmtree(copy / "unet")
    with pytest.raises(ValueError, match="its folder unet/ is missing"):
        load_pipeline(copy)


def test_other_folders_are_refused(copy, tmp_path):
    with pytest.raises(ValueError, match="holds no pipeline"):
        load_pipeline(copy / "unet")
    with pytest.raises((OSError, ValueError), match="nowhere"):
        load_pipeline(tmp_path / "nowhere")


def test_the_fingerprint_changes_with_the_files(copy):
    before = hash_of_folder(copy)
    assert before == hash_of_folder(copy)
    os.utime(copy / "unet" / "config.json", (0, 0))
    assert hash_of_folder(copy) != before
    assert hash_of_folder("someone/model") == "someone/model"
