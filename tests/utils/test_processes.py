"""One process of several that fails ends the others with its error, long before the group's time-out of minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys
from accelerate.utils import gather_object
from diffusers_bitsfusion.utils.processes import failing_together, process_state
state = process_state()

@failing_together()
def work():
    gather_object([1])
    if state.process_index == int(sys.argv[1]):
        raise ValueError("The input of conv_in holds NaN.")
    gather_object([2])

try:
    work()
except Exception as error:
    print(state.process_index, repr(error), flush=True)
    input()  # The launcher ends nothing: no process has ended.
"""


def test_the_others_end_with_the_error_of_the_one_that_fails(tmp_path):
    failing = 0  # It keeps the store in which the error is told.
    (script := tmp_path / "work.py").write_text(SCRIPT)
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29000 + os.getpid() % 5000), "ACCELERATE_USE_CPU": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(failing)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = {rank: process.stdout.readline().strip() for rank, process in enumerate(processes)}
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    error = "ValueError('The input of conv_in holds NaN.')"
    assert said[failing] == f"{failing} {error}"
    assert said[1 - failing] == (
        f"{1 - failing} RuntimeError('Process {failing} failed: ValueError: The input of conv_in holds NaN.')"
    )
