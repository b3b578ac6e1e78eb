"""Size, memory and time of the packed SD-1.5-shaped UNet beside its peers: one command, the tables of docs/RESULTS.md.

    python -m benchmarks.storage --work DIR [--peers-python PYTHON] [--repeats 3]

Builds the UNet in DIR (1.7 GB), quantizes it, loads it, checks it with the reader of docs/FORMAT.md, and times a call.
Peers (`pip install sdnq optimum-quanto`) may live in an environment of their own. Quantizing is repeated with SDNQ and
this package in turn, loading with the fp16 file and the packed one; medians are shown. Files are read from the page
cache unless a row says cold.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measure import drop_page_cache, run_child, warm_page_cache
from benchmarks.peers import MB, PEERS
from benchmarks.sd15_shape import build

LABELS = {"cache": "BitsFusion, 50 cached steps", "default": "BitsFusion, default (any steps)"}


def worker(module: str, name: str, python: str, **options: Any) -> dict[str, Any]:
    """Run one worker of `benchmarks.peers` or `benchmarks.own` in a fresh process."""
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return run_child(["-m", f"benchmarks.{module}", name, *arguments], python)


def quantizing(source: Path, work: Path, peers_python: str, repeats: int) -> dict[str, list[dict[str, Any]] | None]:
    """Every method of quantizing, in turn, `repeats` times; None for a peer that cannot run here."""
    runs: dict[str, list[dict[str, Any]] | None] = {name: [] for name in LABELS}
    runs |= {name: [] if peer.obstacle(peers_python) is None else None for name, peer in PEERS.items()}
    for _ in range(repeats):
        for name, results in runs.items():
            if results is None:
                continue
            warm_page_cache(source)
            out = work / name
            shutil.rmtree(out, ignore_errors=True)
            if name in LABELS:
                results.append(worker("own", "quantize", sys.executable, source=source, out=out, config=name))
            else:
                results.append(worker("peers", name, peers_python, source=source, out=out))
    return runs


def loading(source: Path, work: Path, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Loading and reading each weight once: both files from the page cache, the fp16 file also cold."""
    runs: dict[str, list[dict[str, Any]]] = {"fp16": [], "fp16, cold cache": [], **{name: [] for name in LABELS}}
    for _ in range(repeats):
        for name, results in runs.items():
            if name in LABELS:
                warm_page_cache(work / name)
                results.append(worker("own", "load", sys.executable, out=work / name))
                continue
            warm_page_cache(source) if name == "fp16" else drop_page_cache(source)
            results.append(worker("peers", "fp16", sys.executable, source=source))
    return runs


def median(results: list[dict[str, Any]], key: str) -> float:
    return statistics.median(result[key] for result in results)


def quantizing_table(runs: dict[str, list[dict[str, Any]] | None]) -> str:
    lines = ["| | file, MB | resident, MB | quantize, s | peak memory, MB |", "|---|---|---|---|---|"]
    for name, results in runs.items():
        label = LABELS.get(name, name)
        if results is None:
            lines.append(f"| {label} | not installed, or needs a GPU | | | |")
            continue
        cells = [results[0]["file_bytes"] / MB, results[0]["resident_bytes"] / MB]
        cells += [median(results, "quantize_seconds"), max(result["peak_rss"] for result in results) / MB]
        lines.append(f"| {label} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


def loading_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| | load, s | load and read, s | peak over imports, MB |", "|---|---|---|---|"]
    for name, results in runs.items():
        load = median(results, "load_seconds")
        both = statistics.median(result["load_seconds"] + result["read_seconds"] for result in results)
        peak = max(result["peak_over_imports"] for result in results) / MB
        lines.append(f"| {LABELS.get(name, name)} | {load:.2f} | {both:.2f} | {peak:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models, 6 GB")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers installed")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    source = build(work / "fp16")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "diffusers_bitsfusion"))
    print(f"{platform.machine()}, Python {platform.python_version()}, {packages}\n", flush=True)

    quantized = quantizing(source, work, arguments.peers_python, arguments.repeats)
    print(quantizing_table(quantized), end="\n\n", flush=True)
    for name, label in LABELS.items():
        print(f"{label}:\n{quantized[name][0]['printed']}", end="\n\n", flush=True)
    print(loading_table(loading(source, work, arguments.repeats)), end="\n\n", flush=True)

    check = worker("own", "read_back", sys.executable, out=work / "cache")
    print(f"reader of docs/FORMAT.md: {check['equal_layers']} of {check['layers']} layers equal dequantize()")
    errors = worker("own", "time_features", sys.executable, source=source, out=work / "default")
    print("time features, largest relative RMS error: ", end="")
    print(
        f"{errors['whole_steps_error']:.3%} at whole steps, {errors['half_steps_error']:.3%} at half steps", flush=True
    )
    for dtype in ("float32", "bfloat16"):
        options = {"source": source, "out": work / "cache", "dtype": dtype, "repeats": arguments.repeats + 2}
        call = worker("own", "call_ratio", sys.executable, **options)
        print(f"UNet call, batch 2 at 64x64, {dtype}: packed takes {call['ratio']:.3f} of unquantized", end=" ")
        print(json.dumps([round(ratio, 3) for ratio in call["ratios"]]), flush=True)


if __name__ == "__main__":
    main()
