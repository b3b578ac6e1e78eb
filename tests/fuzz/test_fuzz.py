"""Fuzzing of every kind of file, briefly; `python tests/fuzz/run.py --inputs 100000` is the long run."""

from __future__ import annotations

from pathlib import Path

from fresh_process import FreshProcess


def test_no_reader_fails_raw_hangs_or_accepts_what_was_not_written() -> None:
    """Mutate a few hundred files in a process of its own, which a reader could end."""
    result = FreshProcess([Path(__file__).with_name("run.py"), "--inputs", 400]).result()
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert "all" in result.stdout
