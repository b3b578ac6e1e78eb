"""What quantization-aware training costs: a QAT step over a full-precision fine-tuning step, and the memory of each.

    python -m benchmarks.training --pipeline examples/shapes/pipeline --batch-size 8 --target-bits 2.6
    python -m benchmarks.training --sd15 --batch-size 4 --dtype bfloat16 --gradient-checkpointing [--only quantized]

Both students learn from the same teacher on the same random latents, in one process, called in turn, so that what
slows the machine slows both; the ratio is the median over the pairs. With --sd15 the UNet has random weights of the
shape of Stable Diffusion 1.5; both students with AdamW, and the teacher, then hold 29 GB before any activations, one
of them (--only) 15.5 GB.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from benchmarks.measure import peak_rss
from benchmarks.sd15_shape import random_unet
from diffusers_bitsfusion import BitsFusionConfig, prepare_qat
from diffusers_bitsfusion.codec.grid import half_range
from diffusers_bitsfusion.qat import qat_layers
from diffusers_bitsfusion.training.batches import Batch
from diffusers_bitsfusion.training.losses import Distillation
from diffusers_bitsfusion.training.measure import static_memory
from diffusers_bitsfusion.training.optimizer import make_optimizer

STUDENTS = FULL, QUANTIZED = "full precision", "quantized"
TOKENS = 77
MB = 1e6


def random_batch(unet: UNet2DConditionModel, size: int, side: int, device: torch.device) -> Batch:
    """Latents [size, channels, side, side] and text states of unit noise, at timesteps all over."""
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(size, unet.config.in_channels, side, side, generator=generator)
    states = torch.randn(size, TOKENS, unet.config.cross_attention_dim, generator=generator)
    timesteps = torch.randint(1000, (size,), generator=generator)
    return Batch(list(range(size)), [""] * size, noisy.to(device), timesteps.to(device), states.to(device))


class Student:
    """A model in training with all that a step needs."""

    def __init__(self, model: UNet2DConditionModel, teacher: UNet2DConditionModel, dtype: torch.dtype):
        self.model, self.dtype = model.train(), dtype
        self.objective = Distillation(model, teacher)
        self.optimizer = make_optimizer(model)

    def step(self, batch: Batch) -> float:
        """Seconds of one training step."""
        device = batch.noisy.device
        start = time.perf_counter()
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.objective(self.model, batch)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def gradient_norms(student: Student, batch: Batch) -> dict[str, float]:
    """Norms over all layers of the gradients of latent weights and of scales, with LSQ's factor and without."""
    student.objective(student.model, batch).total.backward()
    squares = {"weights": 0.0, "scales": 0.0, "scales, not rescaled": 0.0}
    for layer in qat_layers(student.model).values():
        of_scales = float(layer.scale.grad.square().sum())
        squares["weights"] += float(layer.weight.grad.square().sum())
        squares["scales"] += of_scales
        squares["scales, not rescaled"] += of_scales * layer.weight[0].numel() * half_range(layer.bits)
    student.optimizer.zero_grad()
    return {name: math.sqrt(square) for name, square in squares.items()}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times and memory of the students, and the ratio of both's times."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    if arguments.sd15:
        plain = random_unet().float().requires_grad_(True)
    else:
        plain = UNet2DConditionModel.from_pretrained(arguments.pipeline, subfolder="unet", dtype=torch.float32)
    teacher = copy.deepcopy(plain).requires_grad_(False).eval().to(device, dtype)
    models = {}
    if FULL in arguments.only:
        models[FULL] = copy.deepcopy(plain)
    if QUANTIZED in arguments.only:
        models[QUANTIZED] = prepare_qat(plain, BitsFusionConfig(target_bits=arguments.target_bits))
    batch = random_batch(plain, arguments.batch_size, arguments.side or plain.config.sample_size, device)
    students = {}
    for name, model in models.items():
        if arguments.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        students[name] = Student(model.to(device), teacher, dtype)
    for student in students.values():
        student.step(batch)  # the first allocates the optimizer's state
    rounds = [{name: student.step(batch) for name, student in students.items()} for _ in range(arguments.repeats)]
    on_gpu = device.type == "cuda"
    report = {
        "device": str(device),
        "dtype": arguments.dtype,
        "batch_size": arguments.batch_size,
        "seconds": {name: statistics.median(times[name] for times in rounds) for name in students},
        "peak_mb": (torch.cuda.max_memory_allocated() if on_gpu else peak_rss()) / MB,
        "memory_mb": {
            name: {part: size / MB for part, size in static_memory(student.model, [teacher], ema=False).items()}
            for name, student in students.items()
        },
    }
    if QUANTIZED in students:
        report["gradient_norms"] = gradient_norms(students[QUANTIZED], batch)
    if len(students) == len(STUDENTS):
        ratios = [times[QUANTIZED] / times[FULL] for times in rounds]
        report |= {"ratio": statistics.median(ratios), "ratios": ratios}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a quantization-aware training step.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pipeline", help="folder or Hub id of a pipeline with a UNet")
    source.add_argument("--sd15", action="store_true", help="random weights of Stable Diffusion 1.5's shape")
    parser.add_argument("--target-bits", type=float, default=1.99)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--side", type=int, help="of the latents; default: the model's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of autocast")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=STUDENTS, default=STUDENTS, metavar="STUDENT")
    print(json.dumps(measure(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
