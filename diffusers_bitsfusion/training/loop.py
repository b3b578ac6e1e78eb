"""The training loop of one stage: any number of processes, exact continuation, an end on the first NaN."""

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

from .batches import Batch, Batches
from .checkpoints import checkpoints, load_checkpoint, read_settings, save_checkpoint
from .losses import Loss
from .sharding import ReplicatedModel, ShardedModel, gathered, sliced_like

LOG_FILE = "losses.jsonl"


class Objective(Protocol):
    """`losses.Distillation` or `losses.NoisePrediction`."""

    def __call__(self, model: nn.Module, batch: Batch) -> Loss: ...

    def close(self) -> None: ...


class TrainingDiverged(RuntimeError):
    """A loss or gradient that is NaN or infinite."""


@dataclass(frozen=True)
class LoopOptions:
    """How long a stage trains and what it keeps.

    Attributes:
        max_train_steps: optimizer steps.
        max_grad_norm: gradients are clipped to this norm.
        checkpointing_steps: a checkpoint every so many steps, and at the end.
        checkpoints_total_limit: keep so many; all where None.
        validation_steps: call `validate` every so many steps; never where None.
        tracker_offset: added to the step that trackers are told, so that a second stage follows the first.
    """

    max_train_steps: int
    max_grad_norm: float = 1.0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    validation_steps: int | None = None
    tracker_offset: int = 0


class TrainingLoop:
    """Trains a prepared model on one objective.

    Args:
        accelerator: prepares the model and the optimizer; nothing else prepared by it may still be in use.
        student: a model prepared by `prepare_qat`, or that shared out over the processes.
        objective: what is minimised.
        batches: where samples come from.
        optimizer: over the student's parameters.
        lr_scheduler: steps once an optimizer step.
        folder: takes checkpoints and `losses.jsonl`.
        settings: what a continued run must agree in.
        options: see there.
        ema: average of the student's parameters.
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
    ):
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
        """Continue from a checkpoint, as if never interrupted; the optimizer's options are those of this run.

        Raises:
            ValueError: see `load_checkpoint`.
            FileExistsError: the folder has later checkpoints, which this run does not lead to.
        """
        taken, _ = read_settings(checkpoint)
        if later := [path.name for path in checkpoints(self.folder) if read_settings(path)[0] > taken]:
            raise FileExistsError(
                f"{self.folder} holds checkpoints later than {checkpoint}: {', '.join(later)}. Delete them to go on "
                "from there, or choose another --output_dir."
            )
        asked = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.step, state = load_checkpoint(self.accelerator, checkpoint, self.settings)
        for group, options in zip(self.optimizer.param_groups, asked, strict=True):
            rate = group["lr"] / group["initial_lr"] * options["initial_lr"]  # where the schedule has come to
            group.update(options | {"lr": rate})
        rates = {
            "base_lrs": [options["initial_lr"] for options in asked],
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
            validate: called with the step, the student holding its averaged weights meanwhile.

        Raises:
            TrainingDiverged: a loss or gradient is NaN or infinite; the last checkpoint is kept.
            OSError: a checkpoint cannot be written.
        """
        options, is_main = self.options, self.accelerator.is_main_process
        self.accelerator.gradient_accumulation_steps = self.batches.sharing.accumulation
        self.accelerator.step = 0
        self.batches.start(self.step)
        log = _LossLog(self.folder / LOG_FILE, self.step) if is_main else None
        bar = tqdm(
            initial=self.step, total=options.max_train_steps, desc=self.folder.name, disable=not is_main, mininterval=1
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
        """The student in evaluation mode, within the block with its averaged weights."""
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
        """The student, unwrapped, with its averaged weights for good; this loop is over."""
        self.objective.close()
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        student = self.placed.whole()
        self.accelerator.free_memory(self.model, self.optimizer)
        return student.eval()

    def _train_step(self) -> dict[str, float]:
        """One optimizer step; losses averaged over all samples of the step."""
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
                    if norm is not None and accelerator.scaler is None:  # fp16's scaler skips such steps itself
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
    """One JSON object a step; on continuing, later steps of the interrupted run are dropped."""

    def __init__(self, path: Path, step: int):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last
        try:
            kept = [line for line in whole if json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, or the lines that are no JSON.") from error
        path.write_text("".join(kept))
        self.path = path

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step} | values) + "\n")
