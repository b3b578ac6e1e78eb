"""Training loop of one stage: on any number of processes, with exact continuation, until the first NaN."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..utils.errors import DamagedFileError
from ..utils.files import naming_file, write_atomically
from ..utils.json_files import is_count, parse_json
from .batches import Batch, Batches
from .checkpoints import check_moments, checkpoints, load_checkpoint, read_settings, save_checkpoint
from .losses import Loss
from .sharding import ReplicatedModel, ShardedModel, gathered, sliced_like

LOG_FILE = "losses.jsonl"


class Objective(Protocol):
    """Objective of a stage, `losses.Distillation` or `losses.NoisePrediction`."""

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of a batch."""
        ...

    def close(self) -> None:
        """Undo what the objective has changed on models."""
        ...


class TrainingDiverged(RuntimeError):
    """A loss or gradient that is NaN or infinite."""


@dataclass(frozen=True)
class LoopOptions:
    """Options of a stage: how long it trains, and what it keeps.

    Attributes:
        max_train_steps: number of optimizer steps.
        max_grad_norm: norm that gradients are clipped to.
        checkpointing_steps: number of steps between checkpoints; the last step has one as well.
        checkpoints_total_limit: number of checkpoints to keep; None for all.
        validation_steps: number of steps between calls of `validate`; None for no calls.
        tracker_offset: number that is added to the step in trackers, so that a second stage follows the first.
        progress: whether to show a progress bar.
    """

    max_train_steps: int
    max_grad_norm: float = 1.0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    validation_steps: int | None = None
    tracker_offset: int = 0
    progress: bool = True


class TrainingLoop:
    """Training loop of a prepared model on one objective.

    Args:
        accelerator: accelerator that prepares the model and the optimizer; no other object that it has prepared may
            still be in use.
        student: model that `prepare_qat` has prepared, sharded or not.
        objective: objective to minimise.
        batches: batches to train on.
        optimizer: optimizer of the student's parameters.
        lr_scheduler: learning rate scheduler, which steps once an optimizer step.
        folder: folder of checkpoints and `losses.jsonl`.
        settings: settings that a continued run must agree in.
        options: options of the stage.
        ema: exponential moving average of the student's parameters; None for none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: ModelMixin | ShardedModel,
        objective: Objective,
        batches: Batches,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        folder: Path,
        settings: dict[str, Any],
        options: LoopOptions,
        ema: EMAModel | None = None,
    ) -> None:
        self.accelerator, self.objective, self.batches = accelerator, objective, batches
        self.folder, self.settings, self.options, self.ema = folder, settings, options, ema
        self.placed = student if isinstance(student, ShardedModel) else ReplicatedModel(accelerator, student)
        self.student, self.lr_scheduler = self.placed.model.train(), lr_scheduler
        self.parameters = list(self.student.parameters())
        self.model, self.optimizer = self.placed.prepare(optimizer)
        if ema is not None:
            ema.to(accelerator.device)
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint, as if never interrupted, but with the optimizer's options of this run.

        Raises:
            ValueError: see `load_checkpoint`.
            FileExistsError: the folder has later checkpoints, which this run would not have written.
        """
        done, _ = read_settings(checkpoint)
        if later := [path.name for path in checkpoints(self.folder) if read_settings(path)[0] > done]:
            raise FileExistsError(
                f"{self.folder} holds checkpoints later than {checkpoint}: {', '.join(later)}. Delete them to go on "
                "from there, or choose another --output_dir."
            )
        requested = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.step, state = load_checkpoint(self.accelerator, checkpoint, self.settings)
        check_moments(checkpoint, self.optimizer)
        for group, options in zip(self.optimizer.param_groups, requested, strict=True):
            rate = group["lr"] / group["initial_lr"] * options["initial_lr"]  # The schedule's progress is kept.
            group.update(options | {"lr": rate})
        rates = {
            "base_lrs": [options["initial_lr"] for options in requested],
            "_last_lr": [group["lr"] for group in self.optimizer.param_groups],
        }
        self.lr_scheduler.load_state_dict(state["lr_scheduler"] | rates)
        if self.ema is not None:
            averages = zip(state["ema"]["shadow_params"], self.parameters, strict=True)
            self.ema.load_state_dict(state["ema"] | {"shadow_params": [sliced_like(*pair) for pair in averages]})
            self.ema.to(self.accelerator.device)

    def save(self) -> Path:
        """Write a checkpoint.

        Raises:
            OSError: see `save_checkpoint`.
        """
        state = {
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema": None if self.ema is None else gathered(self.ema.state_dict(), self.accelerator.is_main_process),
        }
        limit = self.options.checkpoints_total_limit
        return save_checkpoint(self.accelerator, self.folder, self.step, state, self.settings, limit)

    def train(self, validate: Callable[[int], None] | None = None) -> None:
        """Train to `max_train_steps`, then save.

        Args:
            validate: function that is called with the step, while the student has its averaged weights.

        Raises:
            TrainingDiverged: a loss or gradient is NaN or infinite; the last checkpoint is kept.
            OSError: a checkpoint cannot be written.
        """
        options, is_main = self.options, self.accelerator.is_main_process
        self.accelerator.gradient_accumulation_steps = self.batches.sharing.accumulation
        self.accelerator.step = self.step * self.batches.sharing.accumulation
        self.batches.start(self.step)
        log = _LossLog(self.folder / LOG_FILE, self.step) if is_main else None
        bar = tqdm(
            initial=self.step,
            total=options.max_train_steps,
            desc=self.folder.name,
            disable=not (is_main and options.progress),
            mininterval=1,
        )
        while self.step < options.max_train_steps:
            values = self._train_step()
            self.step += 1
            if log is not None:
                log.write(self.step, values)
            named = {f"{self.folder.name}/{name}": value for name, value in values.items()}
            self.accelerator.log(named, step=self.step + options.tracker_offset)
            bar.update()
            bar.set_postfix(loss=f"{values['loss']:.4g}", lr=values["lr"], refresh=False)
            done = self.step == options.max_train_steps
            if done or self.step % options.checkpointing_steps == 0:
                self.save()
            if validate and options.validation_steps and (done or self.step % options.validation_steps == 0):
                with self.averaged():
                    validate(self.step)
        bar.close()

    @contextmanager
    def averaged(self) -> Iterator[ModelMixin]:
        """Set the student to evaluation mode and to its averaged weights within the block."""
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        self.student.eval()
        try:
            yield self.student
        finally:
            self.student.train()
            if self.ema is not None:
                self.ema.restore(self.parameters)

    def finish(self) -> ModelMixin:
        """End the loop, and return the student, unwrapped, with its averaged weights for good."""
        self.objective.close()
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        student = self.placed.whole()
        self.accelerator.free_memory(self.model, self.optimizer)
        return student.eval()

    def _train_step(self) -> dict[str, float]:
        """Make one optimizer step, and return its losses averaged over all samples, by name."""
        accelerator, norm = self.accelerator, None
        sums: dict[str, float] = {}
        for _ in range(self.batches.sharing.accumulation):
            with accelerator.accumulate(self.model):
                batch = self.batches.next()
                loss = self.objective(self.model, batch)
                values = self._averages({"loss": loss.total.detach()} | loss.parts)
                self._check_finite("loss", values["loss"], batch)
                accelerator.backward(loss.total)
                if accelerator.sync_gradients:
                    norm = gathered(accelerator.clip_grad_norm_(self.parameters, self.options.max_grad_norm))
                    if norm is not None and accelerator.scaler is None:  # The scaler of fp16 skips such steps itself.
                        self._check_finite("gradient", float(norm), batch)
                rate = self.lr_scheduler.get_last_lr()[0]
                self.optimizer.step()
                if accelerator.sync_gradients:
                    self.lr_scheduler.step()
                self.optimizer.zero_grad()
            sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
        if self.ema is not None:
            self.ema.step(self.parameters)
        averages = {name: value / self.batches.sharing.accumulation for name, value in sums.items()}
        return averages | {"lr": rate} | ({} if norm is None else {"grad_norm": float(norm)})

    def _averages(self, values: dict[str, Tensor]) -> dict[str, float]:
        stacked = torch.stack([value.float() for value in values.values()])
        return dict(zip(values, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def _check_finite(self, what: str, value: float, batch: Batch) -> None:
        if torch.isfinite(torch.tensor(value)):
            return
        raise TrainingDiverged(
            f"The {what} is {value} in step {self.step + 1}. Process {self.accelerator.process_index} had the samples "
            f"{batch.positions} at the timesteps {batch.timesteps.tolist()}: {batch.captions}. Earlier checkpoints in "
            f"{self.folder} are kept; lower the learning rate, or leave fp16."
        )


class _LossLog:
    """Log of one JSON object a step; on continuing, it drops later steps of the interrupted run."""

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # A kill may have cut the last line.
        kept = [line for number, line in enumerate(whole, start=1) if _step(line, f"{path}, line {number}") <= step]
        write_atomically(path, b"".join(kept))
        self.path = path

    def write(self, step: int, values: dict[str, float]) -> None:
        with naming_file(self.path), self.path.open("a") as stream:
            stream.write(json.dumps({"step": step} | values) + "\n")


def _step(line: bytes, where: str) -> int:
    """Return the step of a line of the log."""
    remedy = "Delete the line, or the file."
    content = parse_json(line, where, non_finite=True, remedy=remedy)
    if not is_count(content.get("step")):
        raise DamagedFileError(where, "is damaged: it has no step", remedy)
    step: int = content["step"]
    return step
