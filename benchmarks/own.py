"""Workers that measure this package on the SD-1.5-shaped UNet; each runs in a fresh process, see storage.py."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from benchmarks.measure import measured_call
from benchmarks.peers import file_bytes, load, resident_bytes
from diffusers_bitsfusion import BitsFusionConfig, size_report
from diffusers_bitsfusion.nn.time_path import TimePath

CONFIGS = {"cache": BitsFusionConfig(time_embedding="cache"), "default": BitsFusionConfig()}
FORMAT_PAGE = Path(__file__).parent.parent / "docs" / "FORMAT.md"


def quantize(source: Path, out: Path, name: str) -> dict[str, Any]:
    """Quantize the fp16 UNet at `source` while loading it, and save it to `out`."""
    start = time.perf_counter()
    unet = UNet2DConditionModel.from_pretrained(source, dtype=torch.float16, quantization_config=CONFIGS[name])
    quantized = time.perf_counter()
    unet.save_pretrained(out)
    report = size_report(out)
    return {
        "quantize_seconds": quantized - start,
        "save_seconds": time.perf_counter() - quantized,
        "resident_bytes": resident_bytes(unet),
        "file_bytes": file_bytes(out),
        "report": report.to_dict(),
        "printed": str(report),
    }


def read_back(out: Path) -> dict[str, Any]:
    """Compare the page's own reader with `dequantize()` of the loaded model, layer by layer."""
    scope: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", FORMAT_PAGE.read_text(encoding="utf-8"), re.DOTALL)[1], scope)
    plain = UNet2DConditionModel.from_pretrained(out, dtype=torch.float32).dequantize()
    equal = [
        np.array_equal(weight, plain.get_submodule(name).weight.detach().numpy())
        for name, weight in scope["read_layers"](out)
    ]
    return {"layers": len(equal), "equal_layers": sum(equal)}


@torch.no_grad()
def time_features(source: Path, out: Path) -> dict[str, Any]:
    """Largest relative RMS error over timesteps of the looked-up features, at whole and at half steps."""
    exact = TimePath.find(UNet2DConditionModel.from_pretrained(source, dtype=torch.float32))
    lookup = UNet2DConditionModel.from_pretrained(out).time_proj
    errors = {}
    for name, steps in (("whole", torch.arange(1000.0)), ("half", torch.arange(999) + 0.5)):
        worst = 0.0
        for part in steps.split(100):
            reference = torch.cat(list(exact.compute(part)[1]), dim=1)
            error = (lookup(part) - reference).norm(dim=1) / reference.norm(dim=1)
            worst = max(worst, float(error.max()))
        errors[f"{name}_steps_error"] = worst
    return errors


@torch.no_grad()
def call_ratio(source: Path, out: Path, dtype: str, repeats: int) -> dict[str, Any]:
    """Time of one UNet call, packed over unquantized, interleaved; batch 2 at 64x64 latents."""
    kind = getattr(torch, dtype)
    models = [UNet2DConditionModel.from_pretrained(path, dtype=kind) for path in (source, out)]
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 64, 64, generator=generator).to(kind)
    text = torch.randn(2, 77, 768, generator=generator).to(kind)
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for model, taken in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(sample, 501, text)
            taken.append(time.perf_counter() - start)
    ratios = [packed / plain for plain, packed in list(zip(*seconds, strict=True))[1:]]
    return {"ratio": statistics.median(ratios), "ratios": ratios, "seconds": statistics.median(seconds[0][1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("worker", choices=["quantize", "load", "read_back", "time_features", "call_ratio"])
    parser.add_argument("--source", type=Path, help="the fp16 UNet")
    parser.add_argument("--out", type=Path, required=True, help="the packed UNet")
    parser.add_argument("--config", choices=CONFIGS, default="default")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    workers = {
        "quantize": (quantize, arguments.source, arguments.out, arguments.config),
        "load": (load, arguments.out),
        "read_back": (read_back, arguments.out),
        "time_features": (time_features, arguments.source, arguments.out),
        "call_ratio": (call_ratio, arguments.source, arguments.out, arguments.dtype, arguments.repeats),
    }
    print(json.dumps(measured_call(*workers[arguments.worker])))


if __name__ == "__main__":
    main()
