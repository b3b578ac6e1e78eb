"""Python processes that have not imported this package, started in a fraction of a second.

A process spends ten seconds of a processor on importing torch, transformers and diffusers. So one server of each
run of pytest imports them, and nothing of this package, and is forked for each process (`multiprocessing`'s
"forkserver"): every process imports this package anew, and has modules, memory and an exit code of its own.

What torch, transformers, huggingface_hub and diffusers read from the environment while they are imported is the
server's, as `conftest.py` set it. Where that matters, or where launching itself is tested, `subprocess` starts a
process.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from torch.distributed import TCPStore

REPOSITORY = Path(__file__).resolve().parent.parent

# Modules that importing this package, or loading a pipeline, imports of other packages.
_PRELOADED = [
    "torch._dynamo",
    "transformers.models.clip.modeling_clip",
    "diffusers.models.controlnets.controlnet",
    "diffusers.quantizers.auto",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "accelerate",
    "peft",
]

# Entries of sys.path that pytest adds and Python would not.
_OF_PYTEST = {str(REPOSITORY / folder) for folder in ("", "examples", "tests")}

# On other systems a process that has loaded torch is not safe to fork; there each one imports all.
_context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


class FreshProcess:
    """A process that runs what `python` would run with the same arguments.

    Args:
        arguments: as of `python`: `-c` and code, `-m` and a module, or the path of a script; then those of sys.argv.
        environment: variables that are added to those of this process.
    """

    def __init__(self, arguments: Sequence[object], environment: dict[str, str] | None = None) -> None:
        added = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | (environment or {})
        self.arguments = [str(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory()
        files = [str(Path(self._folder.name) / name) for name in ("stdout", "stderr")]
        for file in files:
            Path(file).touch()
        self._process = _context.Process(target=_run, args=(self.arguments, os.environ | added, *files))
        # OpenMP reads it when it is loaded, which is in the server; the first process starts that.
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            _context.set_forkserver_preload(_PRELOADED)
            self._process.start()

    @property
    def exitcode(self) -> int | None:
        """The exit code, negative for a signal that ended the process; None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """End the process by SIGKILL."""
        self._process.kill()

    def result(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Wait for the process; return its exit code and all that it wrote.

        Raises:
            subprocess.TimeoutExpired: it was killed after `timeout` seconds.
        """
        self._process.join(timeout)
        if late := self.exitcode is None:
            self.kill()
            self._process.join()
        out, err = (Path(self._folder.name, name).read_text() for name in ("stdout", "stderr"))
        self._folder.cleanup()
        if late:
            raise subprocess.TimeoutExpired(self.arguments, timeout, out, err)
        return subprocess.CompletedProcess(self.arguments, self.exitcode, out, err)


def run_together(arguments: Sequence[object], processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a command as `torchrun --nproc-per-node` does: where one process fails, the others are killed.

    Returns:
        The exit code of the first that failed, or 0, and what all wrote, one after the other.

    Raises:
        subprocess.TimeoutExpired: they were killed after ten minutes.
    """
    # As torchrun's, the store is this process's, or a process that ends first would take it from the others.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    group |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes)) | {"GROUP_RANK": "0"}
    started = [
        FreshProcess(arguments, group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)
    ]
    deadline = time.monotonic() + 600
    while any(process.exitcode is None for process in started) and time.monotonic() < deadline:
        if any(process.exitcode for process in started):
            break
        time.sleep(0.02)
    failed = next((process.exitcode for process in started if process.exitcode), 0)
    if failed:
        for process in started:
            process.kill()
    results = [process.result(max(0, deadline - time.monotonic())) for process in started]
    out, err = ("".join(getattr(result, name) for result in results) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(results[0].args, failed, out, err)


def flush_nothing() -> None:
    """Let `os.fsync` only check its file: tests kill processes, but cut no power, and the disk takes minutes."""

    def fsync(descriptor: int) -> None:
        os.fstat(descriptor)  # It raises as the real one does where there is no such file.

    os.fsync = fsync


def _run(arguments: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """Become, in the forked process, what `python` starts as."""
    flush_nothing()
    gc.freeze()  # a collection of garbage would walk, and so copy, all that the server imported
    for descriptor, file in ((1, out), (2, err)):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    kind, *rest = arguments
    first = str(Path(kind).parent) if not kind.startswith("-") else os.getcwd()
    found = [path for path in sys.path if path and path not in _OF_PYTEST]
    sys.path[:] = [first, *environment["PYTHONPATH"].split(os.pathsep), *found]
    assert "diffusers_bitsfusion" not in sys.modules
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")
