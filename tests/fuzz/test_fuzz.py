"""A few hundred mutations of every kind of file; `python tests/fuzz/run.py --inputs 100000` is the long run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_no_reader_fails_raw_hangs_or_accepts_what_was_not_written():
    command = [sys.executable, Path(__file__).with_name("run.py"), "--inputs", "400"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert "all" in result.stdout
