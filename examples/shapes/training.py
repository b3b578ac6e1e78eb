"""What the stages of pretraining share: a resumable training loop."""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from .graph import GraphedLoss


@dataclass
class TrainOptions:
    """How a stage trains: the learning rate warms up, stays, and decays to zero over the last `cooldown` steps.

    A run without cool-down can be continued for any number of steps; a cool-down branches off from it.
    `batch_size` counts the samples of all processes. `minutes` ends the run early, at a checkpoint. `compile` is for
    the UNet's stage on one GPU: `torch.compile`, and a CUDA graph of each step.
    """

    steps: int
    learning_rate: float
    batch_size: int
    cooldown: int = 0
    warmup: int = 100
    minutes: float | None = None
    save_every: int = 250
    ema_decay: float = 0.999
    mixed_precision: str = "no"
    compile: bool = False
    resume: bool = False
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        left = (self.steps - step) / self.cooldown if self.cooldown else 1.0
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, left)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each of `TrainOptions`; what is left out is the stage's default."""
    parser.add_argument("--resume", action="store_true", default=None, help="continue from the stage's checkpoint")
    parser.add_argument("--steps", type=int, help="last step of the stage, steps before a resume counted in")
    parser.add_argument("--cooldown", type=int, help="steps at the end over which the learning rate decays to zero")
    parser.add_argument("--minutes", type=float, help="end the stage after this time, at a checkpoint")
    parser.add_argument("--batch-size", type=int, help="samples a step, over all processes")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--save-every", type=int, help="steps between checkpoints")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"))
    parser.add_argument("--compile", action="store_true", default=None, help="the UNet by torch.compile; for GPUs")
    parser.add_argument("--seed", type=int)


def with_options(default: TrainOptions, args: argparse.Namespace) -> TrainOptions:
    """Return a stage's options with those of the command line in the place of the defaults."""
    given = {field.name: getattr(args, field.name, None) for field in fields(TrainOptions)}
    return replace(default, **{name: value for name, value in given.items() if value is not None})


class Run:
    """Models in training, with all that an exact continuation needs.

    Every step seeds itself from its number, so no generator state has to be stored. Several processes (started by
    `torchrun` or `accelerate launch`) share a batch and average their gradients.
    """

    def __init__(self, models: dict[str, torch.nn.Module], options: TrainOptions, path: Path):
        self.options, self.path, self.step = options, path, 0
        self._graphs: dict[bool, GraphedLoss] = {}  # before the cool-down, and in it
        self.accelerator = Accelerator(mixed_precision=options.mixed_precision, cpu=not torch.cuda.is_available())
        self.models = {name: model.to(self.accelerator.device) for name, model in models.items()}
        self.parameters = [p for model in self.models.values() for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=options.learning_rate, betas=(0.9, 0.99), fused=True)
        self.emas = {
            name: EMAModel(model.parameters(), decay=options.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
            for name, model in self.models.items()
        }

        if self.accelerator.device.type == "cpu":
            for model in self.models.values():
                if hasattr(model, "set_attn_processor"):
                    model.set_attn_processor(AttnProcessor())  # the fused one's backward is slow in bfloat16 there
        if options.resume and path.exists():
            self._load()

    @property
    def cooling(self) -> bool:
        """Whether this is a step of the cool-down."""
        return self.step >= self.options.steps - self.options.cooldown

    def save(self) -> None:
        """Write everything beside `path`, then rename: an interruption leaves the previous checkpoint whole."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "models": {name: model.state_dict() for name, model in self.models.items()},
            "emas": {name: ema.state_dict() for name, ema in self.emas.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)

    def train(self, loss_of_batch: Callable[[torch.Tensor], torch.Tensor], n_samples: int) -> None:
        """Minimise `loss_of_batch(indices of samples)` until the steps or the minutes are used up; then save."""
        started = time.monotonic()
        bar = tqdm(
            initial=self.step,
            total=self.options.steps,
            desc=self.path.stem,
            mininterval=10,
            disable=not self.accelerator.is_main_process,
        )
        average = None
        while self.step < self.options.steps and not self._out_of_time(started):
            loss = self._train_step(loss_of_batch, n_samples)
            average = loss if average is None else 0.99 * average + 0.01 * loss
            bar.update()
            if self.step % 50 == 0:  # seldom: reading the loss waits for a GPU
                bar.set_postfix(loss=f"{float(average):.4f}", refresh=False)
            if self.step % self.options.save_every == 0:
                self.save()
        bar.close()
        self.save()

    def averaged(self, name: str) -> torch.nn.Module:
        """The model with its averaged weights, ready for inference."""
        self.emas[name].copy_to(self.models[name].parameters())
        return self.models[name].eval()

    def _load(self):
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, model in self.models.items():
            model.load_state_dict(state["models"][name])
            self.emas[name].load_state_dict(state["emas"][name])
            self.emas[name].decay = self.options.ema_decay
            self.emas[name].to(self.accelerator.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def _train_step(self, loss_of_batch, n_samples):
        processes = self.accelerator.num_processes
        torch.manual_seed((self.options.seed + self.step) * processes + self.accelerator.process_index)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate(self.step)
        loss = self._loss_and_gradients(
            loss_of_batch, torch.randint(n_samples, (self.options.batch_size // processes,))
        )
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        for name, model in self.models.items():
            self.emas[name].step(model.parameters())
        self.step += 1
        return loss

    def _loss_and_gradients(self, loss_of_batch, indices):
        if not (self.options.compile and self.accelerator.device.type == "cuda"):
            loss = loss_of_batch(indices)
            loss.backward()
            return loss.detach()
        if self.cooling not in self._graphs:
            self._graphs = {self.cooling: GraphedLoss(loss_of_batch, indices)}
            self.optimizer.zero_grad(set_to_none=False)
        return self._graphs[self.cooling](indices)

    def _average_gradients(self):
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _out_of_time(self, started):
        """Whether the minutes are over; the processes agree on it, or one would wait for the others for ever."""
        if self.options.minutes is None:
            return False
        over = time.monotonic() - started > 60 * self.options.minutes
        if self.accelerator.num_processes == 1:
            return over
        return self.accelerator.reduce(torch.tensor(float(over), device=self.accelerator.device), "sum").item() > 0
