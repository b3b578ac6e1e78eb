"""One process of several that fails ends the others with its error, long before the group's time-out of minutes."""

from __future__ import annotations

import socket

from fresh_process import run_together

SCRIPT = """
import os, sys, time
from pathlib import Path
from accelerate.utils import gather_object
from diffusers_bitsfusion.utils.processes import failing_together, process_state
folder, failing = Path(sys.argv[1]), int(sys.argv[2])
# A store that a process keeps is gone when that one ends.
os.environ |= {"ACCELERATE_USE_CPU": "1", "TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": sys.argv[3]}
state = process_state()

@failing_together()
def work():
    gather_object([1])
    if state.process_index == failing:
        raise ValueError("The input of conv_in holds NaN.")
    gather_object([2])

try:
    work()
except Exception as error:
    (folder / str(state.process_index)).write_text(repr(error))
    while len(list(folder.iterdir())) < state.num_processes:
        time.sleep(0.02)  # The launcher ends nothing: no process has ended.
"""


def test_the_others_end_with_the_error_of_the_one_that_fails(tmp_path):
    failing = 0  # It keeps the store in which the error is told.
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    result = run_together(["-c", SCRIPT, tmp_path, failing, port])
    assert result.returncode == 0, result.stderr[-3000:]
    said = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert said[failing] == "ValueError('The input of conv_in holds NaN.')"
    assert said[1 - failing] == (
        f"RuntimeError('Process {failing} failed: ValueError: The input of conv_in holds NaN.')"
    )
