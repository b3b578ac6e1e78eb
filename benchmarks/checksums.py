"""What checksums add to loading: a packed UNet of Stable Diffusion 1.5's shape, with and without, in turn.

    python -m benchmarks.checksums --work DIR [--repeats 20]

Builds and quantizes the UNet in DIR where it is not there yet (1.9 GB, 20 s), and loads it in one process from the
page cache, by turns with the checksums compared and not. What is shown is the median of each, and of the ratios of
neighbours.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging

from benchmarks.measure import warm_page_cache
from benchmarks.own import quantize
from benchmarks.sd15_shape import WEIGHTS_FILE, build
from diffusers_bitsfusion.codec.checksums import loading


def load_seconds(folder: Path, verify: bool) -> float:
    start = time.perf_counter()
    with loading(verify=verify):
        UNet2DConditionModel.from_pretrained(folder, dtype=torch.float16)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models, 2 GB")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    packed = arguments.work.resolve() / "packed"
    if not (packed / WEIGHTS_FILE).exists():
        packed.mkdir(parents=True, exist_ok=True)
        quantize(build(arguments.work.resolve() / "fp16"), packed, "default")
    warm_page_cache(packed)
    load_seconds(packed, True)  # It imports what is left to import.
    with_checksums, without = [], []
    for repeat in range(arguments.repeats):
        for verify in (True, False) if repeat % 2 else (False, True):
            (with_checksums if verify else without).append(load_seconds(packed, verify))
    ratios = [one / other for one, other in zip(with_checksums, without, strict=True)]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "diffusers_bitsfusion"))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {packages}")
    print(
        f"load {statistics.median(with_checksums):.3f} s with checksums, {statistics.median(without):.3f} s without: "
        f"{statistics.median(ratios):.3f} times ({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
