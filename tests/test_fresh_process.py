"""Processes that are forked from a server end and say what processes that Python starts do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from fresh_process import FreshProcess, run_together

ENDS = [
    "import sys; print(sys.argv[1:]); sys.exit(3)",
    "import sys; sys.exit('why')",
    "import os; os.abort()",
    "print('before'); undefined",
    "import os, sys; print(os.environ['TOLD']); print('diffusers_bitsfusion' in sys.modules, __name__)",
]


@pytest.mark.parametrize("code", ENDS)
def test_a_process_ends_as_pythons_own(code):
    arguments, told = ["-c", code, "a", "b c"], {"TOLD": "x"}
    found = FreshProcess(arguments, told).result()
    expected = subprocess.run([sys.executable, *arguments], env=os.environ | told, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert found.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_modules_and_scripts_run(tmp_path):
    (script := tmp_path / "script.py").write_text("import beside, sys; print(beside.x, __name__, sys.argv)")
    (tmp_path / "beside.py").write_text("x = 5")
    assert FreshProcess([script, 1]).result().stdout == f"5 __main__ ['{script}', '1']\n"
    assert (
        FreshProcess(["-m", "diffusers_bitsfusion", "--version"]).result().stdout.startswith("diffusers_bitsfusion ")
    )


def test_one_that_fails_ends_those_that_wait_for_it():
    code = "import os, time; print(os.environ['RANK']); time.sleep(600 * int(os.environ['RANK'])); undefined"
    result = run_together(["-c", code])
    assert result.returncode == 1 and "NameError" in result.stderr


def test_one_that_takes_too_long_is_killed():
    with pytest.raises(subprocess.TimeoutExpired):
        FreshProcess(["-c", "import time; time.sleep(600)"]).result(timeout=0.1)
