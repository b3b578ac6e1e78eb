"""A calibration killed at a random moment; `python tests/random_kills.py` kills analyses and trainings as well."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fresh_process import FreshProcess


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the processes that are killed")
def test_a_killed_calibration_goes_on_to_the_bytes_of_an_uninterrupted_one():
    result = FreshProcess([Path(__file__).with_name("random_kills.py"), 1, "calibrate", 2]).result()
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert "calibrate    1 kills of 1 runs" in result.stdout
