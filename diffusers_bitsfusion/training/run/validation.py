"""Validation images and scores while training: teacher beside student, from the same seeds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin
from torch.distributed.fsdp import FSDPModule

from ... import evaluation
from ...calibration.time_estimate import time_sampling
from ...evaluation.compositional import judge


@dataclass(frozen=True)
class ScoreChange:
    """Scores of the same prompts and seeds before and after a stage."""

    before: float
    after: float


class Validation:
    """Images of prompts by teacher and student, and their scores where there is a scorer.

    Args:
        prompts: prompts of the images.
        teacher: full-precision pipeline.
        accelerator: accelerator whose trackers receive the grid of images and the score.
        sampling: settings of sampling.
        folder: folder of the grids, `STAGE-STEP.png`.
        scorer: function that scores images by the specs of their prompts.
        rows: number of prompts in the grid.
    """

    def __init__(
        self,
        prompts: list[evaluation.Prompt],
        teacher: DiffusionPipeline,
        accelerator: Accelerator,
        sampling: evaluation.Sampling,
        folder: Path,
        scorer: Callable[..., Any] | None = None,
        rows: int = 8,
    ) -> None:
        self.prompts, self.teacher, self.accelerator = prompts, teacher, accelerator
        self.sampling, self.folder, self.scorer, self.rows = sampling, folder, scorer, rows
        self._scores: dict[str, np.ndarray] = {}
        self._teacher_images: np.ndarray | None = None

    @classmethod
    def from_args(
        cls, args: argparse.Namespace, teacher: DiffusionPipeline, accelerator: Accelerator
    ) -> Validation | None:
        """Return the validation that the command line requests, if any."""
        if args.validation_file is not None:
            prompts = evaluation.read_prompts(args.validation_file)
        elif args.validation_prompts:
            prompts = [evaluation.Prompt(caption) for caption in args.validation_prompts]
        else:
            return None
        sampling = evaluation.Sampling(args.num_inference_steps, args.validation_guidance_scale)
        scorer = None if args.validation_scorer is None else evaluation.load_scorer(args.validation_scorer)
        folder = Path(args.output_dir) / "validation"
        return cls(prompts, teacher, accelerator, sampling, folder, scorer, args.validation_grid)

    def seconds(self, student: ModelMixin) -> float:
        """Return the time that sampling all images takes, from a trial of two steps; every process must call it."""
        count = len(self.prompts)
        batch = min(self.sampling.batch_size, count)
        trial = time_sampling(self.teacher, student, lambda steps: self._generate(student, batch, steps))
        return -(-count // batch) * trial.seconds(self.sampling.steps)

    def has_scored(self, stage: str) -> bool:
        """Return whether a stage has been scored in this run."""
        return stage in self._scores

    def change(self, before: str, after: str, load_before: Callable[[], ModelMixin]) -> ScoreChange:
        """Return how the score changed from the end of one stage to that of another.

        Args:
            before, after: names of the stages, of which the second has been scored.
            load_before: function that returns the model at the end of the first one, which is called only where it
                was not scored in this run.
        """
        if before not in self._scores:
            assert self.scorer is not None
            self._scores[before] = judge(self.scorer, self._generate(load_before()), self._specs)
        categories = [prompt.category for prompt in self.prompts]
        first, second = (
            evaluation.bootstrap_scores(self._scores[name], categories)["overall"].value for name in (before, after)
        )
        return ScoreChange(first, second)

    def of_stage(self, name: str, student: ModelMixin, tracker_offset: int) -> Callable[[int], None]:
        """Return the function that the training loop calls with its step.

        Args:
            name: name of the stage.
            student: model in training.
            tracker_offset: number that is added to the step in trackers.
        """

        def validate(step: int) -> None:
            # All processes of a sharded model must compute together.
            if self.accelerator.is_main_process or isinstance(student, FSDPModule):
                self._validate(name, student, step, step + tracker_offset)
            self.accelerator.wait_for_everyone()

        return validate

    def _validate(self, name: str, student: ModelMixin, step: int, tracked_step: int) -> None:
        if self._teacher_images is None:
            self._teacher_images = self._generate(self.teacher.unet)
        images = self._generate(student)
        if not self.accelerator.is_main_process:
            return
        captions = [prompt.caption for prompt in self.prompts]
        columns = [self._teacher_images[: self.rows], images[: self.rows]]
        grid = evaluation.image_grid(columns, ["teacher", f"student, step {step}"], captions[: self.rows])
        self.folder.mkdir(parents=True, exist_ok=True)
        grid.save(self.folder / f"{name}-{step}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({f"{name}/validation": np.asarray(grid)[None]}, tracked_step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({f"{name}/validation": [grid]}, tracked_step)
        if self.scorer is not None:
            self._score(self.scorer, name, step, tracked_step, images)

    def _score(self, scorer: Callable[..., Any], name: str, step: int, tracked_step: int, images: np.ndarray) -> None:
        categories = [prompt.category for prompt in self.prompts]
        scores = self._scores[name] = judge(scorer, images, self._specs)
        overall = evaluation.bootstrap_scores(scores, categories)["overall"]
        print(
            f"{name}, step {step}: compositional score {overall.value:.3f} ({overall.low:.3f} to {overall.high:.3f})"
        )
        self.accelerator.log({f"{name}/compositional": overall.value}, tracked_step)

    @property
    def _specs(self) -> list[Any]:
        return [prompt.spec for prompt in self.prompts]

    def _generate(self, unet: ModelMixin, count: int | None = None, steps: int | None = None) -> np.ndarray:
        """Generate images by the pipeline with `unet` in it, uint8 [prompts, height, width, 3].

        Args:
            unet: the teacher's or the student.
            count: number of the prompts; all when left out.
            steps: inference steps; those of the settings when left out.
        """
        teacher, self.teacher.unet = self.teacher.unet, unet
        captions = [prompt.caption for prompt in self.prompts[:count]]
        sampling = self.sampling if steps is None else replace(self.sampling, steps=steps)
        try:
            with self.accelerator.autocast():
                return evaluation.generate_images(self.teacher, captions, sampling, progress=False)
        finally:
            self.teacher.unet = teacher
