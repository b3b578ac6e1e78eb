"""Time and memory of a run, from a trial step, and the error of quantization along the timesteps."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import ModelMixin, SchedulerMixin
from torch import nn

from ..utils.durations import as_duration
from .batches import Batches
from .loop import TrainingLoop
from .losses import predict
from .sharding import local
from .timestep_errors import ErrorMeter, TimestepErrors

_GB = 1e9


@dataclass(frozen=True)
class Estimate:
    """Estimated time and memory of a stage on each process.

    Attributes:
        seconds_per_step: seconds of an optimizer step.
        steps: number of remaining steps.
        memory: bytes by part.
        validations: number of validations among the remaining steps.
        seconds_per_validation: seconds of one.
    """

    seconds_per_step: float
    steps: int
    memory: dict[str, int]
    validations: int = 0
    seconds_per_validation: float = 0.0

    @property
    def total_seconds(self) -> float:
        """Seconds of all steps and validations."""
        return self.seconds_per_step * self.steps + self.seconds_per_validation * self.validations

    def __str__(self) -> str:
        lines = [f"about {as_duration(self.total_seconds)}"]
        lines += [f"  {f'{self.steps} steps':<34}{as_duration(self.seconds_per_step):>11} each"]
        if self.validations:
            each = as_duration(self.seconds_per_validation)
            lines += [f"  {f'{self.validations} samplings of validation images':<34}{each:>11} each"]
        lines += [f"  {part:<34}{size / _GB:>8.2f} GB" for part, size in self.memory.items()]
        lines += [f"  {'memory of each process':<34}{sum(self.memory.values()) / _GB:>8.2f} GB"]
        return "\n".join(lines)


def static_memory(
    student: nn.Module, frozen: Iterable[nn.Module], ema: bool = True, optimizer_bytes: int = 8
) -> dict[str, int]:
    """Return the bytes that training holds on each process independently of the batch, by part.

    Args:
        student: model in training; where it is sharded, this process's shards count.
        frozen: teacher, VAE, text encoder.
        ema: whether training keeps an exponential moving average of the student.
        optimizer_bytes: bytes of optimizer state of each trained parameter: 8 for AdamW, 2 for its 8-bit form.
    """
    trained = sum(local(p).numel() for p in student.parameters() if p.requires_grad)
    held = sum(local(p).nbytes for p in student.parameters())
    return {
        "latent weights, scales, the rest": held,
        "their gradients": 4 * trained,
        "optimizer": optimizer_bytes * trained,
        "average (EMA)": held if ema else 0,
        "teacher, VAE, text encoder": sum(p.nbytes for model in frozen for p in model.parameters()),
    }


def estimate(loop: TrainingLoop, memory: dict[str, int]) -> Estimate:
    """Time a forward and backward pass on a real batch, without changing the model. Every process must call it.

    Args:
        loop: loop that is about to train.
        memory: bytes by part, see `static_memory`; on CUDA the trial's activations are added.
    """
    device, batches = loop.accelerator.device, loop.batches
    for _ in range(2):  # The first trial also allocates and compiles, so that the second one counts.
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        batches.start(loop.step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        loss = loop.objective(loop.model, batches.next())
        loop.accelerator.backward(loss.total)
        if device.type == "cuda":
            torch.cuda.synchronize()
            grown = torch.cuda.max_memory_allocated() - before
            memory = memory | {"activations": grown - memory["their gradients"]}
        seconds = (time.perf_counter() - started) * batches.sharing.accumulation
        if batches.renewed_every:
            seconds += (started - start) / batches.renewed_every
        loop.optimizer.zero_grad()
    return Estimate(seconds, loop.options.max_train_steps - loop.step, memory)


@torch.no_grad()
def measure_timestep_errors(
    accelerator: Accelerator,
    student: ModelMixin,
    teacher: ModelMixin,
    batches: Batches,
    scheduler: SchedulerMixin,
    num_samples: int = 2560,
) -> TimestepErrors:
    """Measure the error of quantization in the clean latents along the timesteps (paper, section 6).

    Every process must call it.

    Args:
        accelerator: accelerator of the processes.
        student: model that `prepare_qat` has prepared, not wrapped.
        teacher: full-precision model.
        batches: batches with uniform timesteps, which spread the samples over the curve.
        scheduler: scheduler with the noise schedule and the prediction type of the models.
        num_samples: minimal number of samples; the paper has 128 at each timestep.
    """
    meter = ErrorMeter(scheduler.alphas_cumprod, scheduler.config.prediction_type)
    sharing = batches.sharing
    batches.start(0)
    for _ in range(-(-num_samples // (sharing.batch_size * sharing.processes))):
        batch = batches.next()
        with accelerator.autocast():
            quantized = predict(student, batch.noisy, batch.timesteps, batch.states)
        exact = predict(teacher, batch.noisy, batch.timesteps, batch.states)
        meter.update(quantized, exact, batch.timesteps)
    device = accelerator.device
    total = accelerator.reduce(torch.stack([meter.sums, meter.counts]).float().to(device), "sum")
    meter.sums, meter.counts = total.double().cpu()
    return meter.result()
