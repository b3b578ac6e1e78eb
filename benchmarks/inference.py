"""Time of one UNet call beside full precision and beside other packages, interleaved: one command, its tables.

    python -m benchmarks.inference --work DIR [--peers-python PYTHON] [--sizes 64 32] [--repeats 5] [--compiled]
        [--device cpu|cuda] [--dtypes float32 ...] [--shape sd15|sdxl] [--only NAME ...]

Every contestant lives in a process of its own with its model loaded, and is asked for one call at a time, all in turn,
so that the machine's drift cancels in the ratios: a ratio is that of two calls of the same round. Medians are shown,
with the smallest and the largest in brackets. The first call of each is not counted. Models are built, quantized and
saved in DIR on the first run. With `--compiled` every contestant goes through `torch.compile` (CUDA graphs on a GPU).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.inference_worker import MARK
from benchmarks.measure import REPOSITORY, run_child, warm_page_cache
from benchmarks.peers import MB, PEERS
from benchmarks.sd15_shape import SHAPES, build


@dataclass(frozen=True)
class Contestant:
    """A configuration of the UNet: the folder it is loaded from, and the worker's options."""

    folder: str
    dtype: str
    options: tuple[str, ...] = ()
    peer: str | None = None

    def arguments(self, work: Path, device: str, compiled: bool) -> list[str]:
        common = ["--model", str(work / self.folder), "--dtype", self.dtype, "--device", device]
        peer = ["--peer", self.peer] if self.peer else []
        return [*common, *peer, *self.options, *(["--compiled"] if compiled else [])]


SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def contestants(dtypes: list[str], compiled: bool) -> dict[str, Contestant]:
    """All configurations by name, full precision in each dtype first. `torch.compile` needs a C compiler."""
    found = {SHORT[dtype]: Contestant("fp16", dtype) for dtype in dtypes}
    computations = {
        "exact": ("--compute", "exact"),
        "int8": ("--compute", "int8"),
        "int8 resident": ("--compute", "int8", "--resident", "int8"),
    }
    for dtype in dtypes:
        for computation, options in computations.items():
            found[f"bitsfusion {computation} {SHORT[dtype]}"] = Contestant("own", dtype, options)
        if not compiled:
            options = (*computations["exact"], "--no-compiler")
            found[f"bitsfusion exact without a compiler {SHORT[dtype]}"] = Contestant("own", dtype, options)
        for name in PEERS:
            found[f"{name} {SHORT[dtype]}"] = Contestant(name, dtype, peer=name)
    return found


def prepare(work: Path, shape: str, names: set[str], peers_python: str) -> None:
    """Build, quantize and save what the contestants load, unless it is there."""
    source = build(work / "fp16", shape=shape)
    for name in sorted(names - {"fp16"}):
        if (work / name / "config.json").exists():
            continue
        module, python = ("own", sys.executable) if name == "own" else ("peers", peers_python)
        worker = ["quantize", "--config", "default"] if name == "own" else [name]
        run_child(["-m", f"benchmarks.{module}", *worker, "--source", str(source), "--out", str(work / name)], python)


@dataclass
class Runner:
    """A contestant's process."""

    process: subprocess.Popen
    loaded: dict[str, Any] = field(default_factory=dict)
    peak_bytes: int = 0

    @classmethod
    def start(cls, arguments: list[str], python: str) -> Runner:
        command = [python, "-m", "benchmarks.inference_worker", *arguments]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        runner = cls(process)
        runner.loaded = runner.answer()
        return runner

    def answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise RuntimeError(f"{' '.join(self.process.args)} ended with {self.process.wait()}")

    def call(self, size: int) -> float:
        self.process.stdin.write(f"{size}\n")
        self.process.stdin.flush()
        answer = self.answer()
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        return answer["seconds"]

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def race(runners: dict[str, Runner], size: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each, one of each in every round, after an uncounted first."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for round_number in range(repeats + 1):
        for name, runner in runners.items():
            taken = runner.call(size)
            if round_number:
                seconds[name].append(taken)
    return seconds


def ratio(seconds: list[float], baseline: list[float]) -> str:
    """Median of the ratios of the rounds, and their extremes."""
    ratios = [own / other for own, other in zip(seconds, baseline, strict=True)]
    return f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"


def speed_table(seconds: dict[str, list[float]], baselines: list[str]) -> str:
    lines = [
        "| | seconds | " + " | ".join(f"of {name}" for name in baselines) + " |",
        "|---|---|" + "---|" * len(baselines),
    ]
    for name, taken in seconds.items():
        cells = [f"{statistics.median(taken):.3f}", *(ratio(taken, seconds[base]) for base in baselines)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_table(runners: dict[str, Runner]) -> str:
    lines = ["| | file, MB | load, s | resident, MB | peak, MB |", "|---|---|---|---|---|"]
    for name, runner in runners.items():
        loaded = runner.loaded
        sizes = (loaded["file_bytes"], loaded["resident_bytes"], runner.peak_bytes)
        file, resident, peak = (f"{size / MB:.0f}" for size in sizes)
        lines.append(f"| {name} | {file} | {loaded['load_seconds']:.2f} | {resident} | {peak} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models, 5 GB (sdxl: 15 GB)")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers installed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=SHORT, help="default: float32, and bfloat16 (float16 on a GPU)")
    parser.add_argument("--shape", choices=SHAPES, default="sd15")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 32], help="latents' height and width")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--only", nargs="+", help="names of contestants; full precision always runs")
    arguments = parser.parse_args()
    dtypes = arguments.dtypes or ["float32", "float16" if arguments.device == "cuda" else "bfloat16"]
    entered = contestants(dtypes, arguments.compiled)
    baselines = [SHORT[dtype] for dtype in dtypes]
    if arguments.only:
        entered = {name: entered[name] for name in dict.fromkeys([*baselines, *arguments.only])}
    for name, entry in list(entered.items()):
        obstacle = entry.peer and PEERS[entry.peer].obstacle(arguments.peers_python)
        if obstacle:
            print(f"{name}: {obstacle}")
            del entered[name]
    work = arguments.work.resolve() / arguments.shape
    work.mkdir(parents=True, exist_ok=True)
    prepare(work, arguments.shape, {entry.folder for entry in entered.values()}, arguments.peers_python)

    with contextlib.ExitStack() as stack:
        runners = {}
        for name, entry in entered.items():
            python = arguments.peers_python if entry.peer else sys.executable
            warm_page_cache(work / entry.folder)
            options = [*entry.arguments(work, arguments.device, arguments.compiled), "--batch", str(arguments.batch)]
            runners[name] = Runner.start(options, python)
            stack.callback(runners[name].stop)
        for size in arguments.sizes:
            print(f"batch {arguments.batch} at {size}x{size}, {'compiled' if arguments.compiled else 'eager'}")
            print(speed_table(race(runners, size, arguments.repeats), baselines), end="\n\n", flush=True)
        print(memory_table(runners))


if __name__ == "__main__":
    main()
