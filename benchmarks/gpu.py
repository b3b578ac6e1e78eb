"""All that a GPU can show in nine minutes: one command, one page of Markdown.

    python -m benchmarks.gpu [--work DIR] [--out FILE.md] [--minutes 9] [--only PART ...]
    python -m benchmarks.gpu --device cpu --tiny      # a dry run, in a minute or two

Each part runs in a process of its own under a limit of its own, the most wanted first. A part that fails or takes
longer is reported with the end of what it printed, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import REPOSITORY
from benchmarks.sd15_shape import random_unet

SHAPES_PIPELINE = REPOSITORY / "examples" / "shapes" / "pipeline"
QAT_STEPS = 3
FAILURE_LINES = 12


@dataclass(frozen=True)
class Part:
    """A command after the interpreter's name, with the most seconds that it may take."""

    name: str
    command: list[str]
    limit: float


def parts(work: Path, device: str, tiny: bool) -> list[Part]:
    """All parts; their limits add up to nine minutes."""
    dtype, short = ("float16", "fp16") if device == "cuda" else ("float32", "fp32")
    calls = ["-m", "benchmarks.inference", "--work", str(work), "--device", device, "--dtypes", dtype]
    calls += ["--shape", "tiny" if tiny else "sd15", "--sizes", "16" if tiny else "64"]
    only = ["--only", f"bitsfusion exact {short}", f"bitsfusion int8 {short}"]
    own = ["-m", "benchmarks.gpu", "--device", device, *(["--tiny"] if tiny else []), "--worker"]
    repeats = "1" if tiny else "10"
    decode = ["-m", "benchmarks.ops", "decode", "--device", device, "--repeats", "1" if tiny else "5"]
    return [
        Part("tests", ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"], 110),
        Part("calls, batch 2", [*calls, "--batch", "2", "--repeats", repeats, *only], 90),
        Part("calls, batch 8", [*calls, "--batch", "8", "--repeats", repeats, *only], 50),
        Part("decoding", decode, 40),
        Part("QAT step", [*own, "qat"], 45),
        Part("calibration", [*own, "calibration"], 45),
        Part("compiled calls, batch 2", [*calls, "--batch", "2", "--repeats", repeats, "--compiled", *only], 160),
    ]


@dataclass(frozen=True)
class Outcome:
    """What became of a part: "done", "failed" or "out of time", with what it printed."""

    state: str
    seconds: float
    printed: str


def run_part(part: Part, left: float) -> Outcome:
    """Run a part for its limit at most, or for the seconds that are left."""
    start = time.monotonic()
    limit = min(part.limit, left)
    if limit < 1:
        return Outcome("out of time", 0.0, "")
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *part.command], cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            state = "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
            _end(process)
        output.seek(0)
        return Outcome(state, time.monotonic() - start, output.read())


def _end(process: subprocess.Popen) -> None:
    """End a process with all that it started, which would go on computing beside the next part."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def page(outcomes: dict[str, Outcome], device: str) -> str:
    """The outcomes as Markdown, what failed at the end of its part."""
    lines = [f"# {machine(device)}", "", "| part | | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {outcome.state} | {outcome.seconds:.0f} |" for name, outcome in outcomes.items()]
    for name, outcome in outcomes.items():
        printed = outcome.printed.strip().splitlines()
        tables = [line for line in printed if line.startswith(("|", "batch "))]
        if outcome.state != "done":
            shown = [*tables, "", "```text", *printed[-FAILURE_LINES:], "```"]
        else:
            shown = tables or printed[-1:]
        lines += ["", f"## {name}", "", *shown]
    return "\n".join(lines) + "\n"


def machine(device: str) -> str:
    """Name of the device and versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()}), a dry run"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def _synchronized(call: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def qat_step(device: str, tiny: bool) -> dict[str, float]:
    """Seconds of one step of Stage I on one latent, and peak memory: forward, backward and AdamW in fp32."""
    from diffusers_bitsfusion import BitsFusionConfig, prepare_qat

    unet = random_unet(shape="tiny" if tiny else "sd15").float().to(device)
    prepare_qat(unet, BitsFusionConfig())
    unet.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)
    config = unet.config
    latents = torch.randn(1, config.in_channels, config.sample_size, config.sample_size, device=device)
    text = torch.randn(1, 77, config.cross_attention_dim, device=device)

    def step() -> None:
        loss = torch.nn.functional.mse_loss(unet(latents, 501, text).sample, latents)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = [_synchronized(step, device) for _ in range(1 + (1 if tiny else QAT_STEPS))][1:]
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    return {"seconds a step": statistics.median(seconds), "peak, GB": peak}


def calibration(device: str, tiny: bool) -> dict[str, float]:
    """Seconds that calibrating the shapes pipeline takes."""
    from diffusers import StableDiffusionPipeline

    from diffusers_bitsfusion import BitsFusionConfig, Calibration, quantize_model

    pipeline = StableDiffusionPipeline.from_pretrained(SHAPES_PIPELINE, dtype=torch.float32).to(device)
    samples, steps = (1, 1) if tiny else (16, 20)
    run = Calibration(["a red circle", "two blue squares"], num_samples=samples, num_inference_steps=steps)
    config = BitsFusionConfig(recipe=2)  # the default's bits are fewer than so small a UNet can take
    return {"seconds": _synchronized(lambda: quantize_model(pipeline, config, calibration=run), device)}


WORKERS = {"qat": qat_step, "calibration": calibration}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/gpu"), help="folder for models, 3 GB")
    parser.add_argument("--out", type=Path, help="where to write the page as well")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and one repetition: a dry run")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--only", nargs="+", help="names of parts; default: all")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        result = WORKERS[arguments.worker](arguments.device, arguments.tiny)
        print(f"| {' | '.join(result)} |\n|{'---|' * len(result)}")
        print(f"| {' | '.join(f'{value:.2f}' for value in result.values())} |")
        return
    end = time.monotonic() + 60 * arguments.minutes
    outcomes: dict[str, Outcome] = {}
    for part in parts(arguments.work.resolve(), arguments.device, arguments.tiny):
        if arguments.only and part.name not in arguments.only:
            continue
        outcomes[part.name] = run_part(part, end - time.monotonic())
        text = page(outcomes, arguments.device)
        if arguments.out:  # after each part: whatever ends the run, what is measured is there
            arguments.out.write_text(text, encoding="utf-8")
        print(json.dumps({"part": part.name, "state": outcomes[part.name].state}), file=sys.stderr, flush=True)
    print(text)
    sys.exit(any(outcome.state != "done" for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
