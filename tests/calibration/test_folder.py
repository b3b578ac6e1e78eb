"""The folder of a calibration: disks that become full, and two calibrations at once."""

from __future__ import annotations

import os
import platform
import re
import signal

import pytest
from helpers import files_no_larger_than

from diffusers_bitsfusion import quantize_model
from diffusers_bitsfusion.calibration import run as calibration_run
from diffusers_bitsfusion.calibration.folder import using_alone
from diffusers_bitsfusion.utils.errors import FolderInUseError


@pytest.mark.parametrize("limit", [600, 8000])  # the first file of moments, and a layer among the later ones
def test_a_full_disk_names_the_file_and_with_room_it_goes_on_to_the_same_model(
    make_pipeline, config, make_calibration, monkeypatch, tmp_path, equal_models, limit
):
    monkeypatch.setattr(calibration_run, "_SAVE_EVERY", 0)
    pipeline, folder = make_pipeline(), tmp_path / "cache"
    tokenizer = pipeline.tokenizer.backend_tokenizer.to_str()
    calibration = make_calibration(num_samples=2, cache_dir=folder)
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    words = rf"^Could not write {re.escape(str(folder))}.*is kept; do the same again when there is room\.$"
    with files_no_larger_than(limit):
        with pytest.raises(OSError, match=words) as raised:
            quantize_model(pipeline, config, progress=False, calibration=calibration)
    assert "\n" not in str(raised.value)
    assert not list(folder.rglob("*.part"))
    assert all((tensor == before[name]).all() for name, tensor in pipeline.unet.state_dict().items())
    resumed = quantize_model(pipeline, config, progress=False, calibration=calibration)
    whole = quantize_model(make_pipeline(), config, progress=False, calibration=make_calibration(num_samples=2))
    assert equal_models(resumed.unet, whole.unet)
    assert pipeline.tokenizer.backend_tokenizer.to_str() == tokenizer  # It is saved, too.


def test_a_second_calibration_says_who_holds_the_folder_until_that_ends(tmp_path):
    entered, leave = os.pipe()
    child = os.fork()
    if not child:
        with using_alone(tmp_path, 0):
            os.write(leave, b"x")
            signal.pause()
        os._exit(1)
    try:
        os.read(entered, 1)
        holder = rf"{tmp_path} is in use by process {child} on {platform.node()}\. Wait"
        with pytest.raises(FolderInUseError, match=holder):
            with using_alone(tmp_path, 0):
                pass
        with using_alone(tmp_path, 1):  # another process of the same calibration
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with using_alone(tmp_path, 0):
        pass
