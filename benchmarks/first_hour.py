"""Seconds that a newcomer waits: for `bitsfusion --help`, a clone's first image, and an installed package's.

    python -m benchmarks.first_hour --work WORK [--only help installed clone] [--repeats 3]

Whole processes, with all that they start; medians of the repeats, which take turns. Beside the wall clock stands the
time of the processor, which other work on the machine hardly changes. `installed` makes an environment, installs torch
and the package from this working tree, and in one fresh process quantizes the shapes pipeline, saves it, loads it and
generates an image. `clone` clones this repository and runs `make demo`, which makes an environment with all extras.
pip's cache of downloads is used as it is: the first repeat fills it, where it was empty.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import REPOSITORY

TORCH = "torch==2.13.0"
# Files of a working tree that are no source.
_LEFT_OUT = shutil.ignore_patterns(".venv", ".git", "build", "dist", "demo", "*.egg-info", "__pycache__", "work")
DRAW = """
import sys
import torch
from diffusers import DiffusionPipeline
from diffusers_bitsfusion import BitsFusionConfig, quantize_model
source, folder = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(source, dtype=torch.float32)
quantize_model(pipe, BitsFusionConfig(target_bits=3)).save_pretrained(folder)
pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
pipe("a red circle", num_inference_steps=20).images[0].save(folder + "/image.png")
"""


@dataclass(frozen=True)
class Seconds:
    """Time of a process: by the wall clock, and of all processors together."""

    wall: float
    processor: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.processor + other.processor)


def timed(command: Sequence[str | Path], folder: Path, code: int = 0) -> Seconds:
    """Run a command in a folder and return its time.

    Raises:
        RuntimeError: it does not end with `code`.
    """
    words = [str(part) for part in command]
    start, used = time.perf_counter(), sum(os.times()[2:4])
    ended = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    seconds = Seconds(time.perf_counter() - start, sum(os.times()[2:4]) - used)
    if ended.returncode != code:
        raise RuntimeError(f"{words} ended with {ended.returncode}: {ended.stderr[-2000:]}")
    return seconds


def measure_help(work: Path) -> dict[str, Seconds]:
    """Time `bitsfusion --help` and a misspelled option in this environment."""
    program = [sys.executable, "-c", "from bitsfusion_launcher import main; main()"]
    return {
        "`bitsfusion --help`": timed([*program, "--help"], work),
        "a misspelled option": timed([*program, "quantize", "--tpyo"], work, code=2),
    }


def measure_installed(work: Path) -> dict[str, Seconds]:
    """Time installing the package into a fresh environment, and its first image."""
    environment, source, packed = (work / name for name in ("environment", "source", "packed"))
    for folder in (environment, source, packed):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(REPOSITORY, source, ignore=_LEFT_OUT)
    pip = [environment / "bin" / "pip", "install", "--quiet"]
    install = timed([sys.executable, "-m", "venv", environment], work)
    install += timed([*pip, TORCH], work) + timed([*pip, source], work)
    pipeline = REPOSITORY / "examples" / "shapes" / "pipeline"
    draw = timed([environment / "bin" / "python", "-c", DRAW, pipeline, packed], work)
    return {
        "`pip install` in a fresh environment": install,
        "quantize, save, reload, generate": draw,
        "both": install + draw,
    }


def measure_clone(work: Path) -> dict[str, Seconds]:
    """Time `git clone`, the environment of a clone, and its first images."""
    clone = work / "clone"
    shutil.rmtree(clone, ignore_errors=True)
    cloning = timed(["git", "clone", REPOSITORY, clone], work)
    environment = timed(["make", ".venv/installed"], clone)
    demo = timed(["make", "demo"], clone)
    return {
        "`git clone`": cloning,
        "its environment": environment,
        "`make demo`": demo,
        "all three": cloning + environment + demo,
    }


MEASURES: dict[str, Callable[[Path], dict[str, Seconds]]] = {
    "help": measure_help,
    "installed": measure_installed,
    "clone": measure_clone,
}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the environments, of some GB each")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Seconds]] = {}
    for _ in range(args.repeats):
        for name in args.only:
            for what, seconds in MEASURES[name](work).items():
                found.setdefault(what, []).append(seconds)
    content = {what: [asdict(each) for each in times] for what, times in found.items()}
    (work / "first_hour.json").write_text(json.dumps(content, indent=2) + "\n")
    print("| | seconds | of the processor |\n|---|---|---|")
    for what, times in found.items():
        wall, processor = (statistics.median(getattr(each, kind) for each in times) for kind in ("wall", "processor"))
        print(f"| {what} | {wall:.1f} | {processor:.1f} |")


if __name__ == "__main__":
    main()
