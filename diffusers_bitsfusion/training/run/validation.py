"""Pictures and scores while training: teacher beside student, from the same seeds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin
from torch.distributed.fsdp import FSDPModule

from ... import evaluation
from ...evaluation.compositional import judge


class Validation:
    """Draws the prompts with teacher and student; scores them where there is a scorer.

    Args:
        prompts: what to draw.
        teacher: the full-precision pipeline.
        accelerator: its trackers get the picture and the score.
        sampling: how pictures are drawn.
        folder: takes `STAGE-STEP.png`.
        scorer: judges images by their prompt's spec.
        rows: prompts in the picture.
    """

    def __init__(
        self,
        prompts: list[evaluation.Prompt],
        teacher: DiffusionPipeline,
        accelerator: Accelerator,
        sampling: evaluation.Sampling,
        folder: Path,
        scorer: Callable | None = None,
        rows: int = 8,
    ):
        self.prompts, self.teacher, self.accelerator = prompts, teacher, accelerator
        self.sampling, self.folder, self.scorer, self.rows = sampling, folder, scorer, rows
        self._drawn_by_teacher: np.ndarray | None = None

    @classmethod
    def from_args(
        cls, args: argparse.Namespace, teacher: DiffusionPipeline, accelerator: Accelerator
    ) -> Validation | None:
        """The validation that the command line asks for, if any."""
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

    def of_stage(self, name: str, student: ModelMixin, tracker_offset: int) -> Callable[[int], None]:
        """What the training loop calls with the step; to which trackers are told that the offset is added."""

        def validate(step: int) -> None:
            # The processes that share a model compute with it together.
            if self.accelerator.is_main_process or isinstance(student, FSDPModule):
                self._validate(name, student, step, step + tracker_offset)
            self.accelerator.wait_for_everyone()

        return validate

    def _validate(self, name: str, student: ModelMixin, step: int, tracked_step: int) -> None:
        if self._drawn_by_teacher is None:
            self._drawn_by_teacher = self._draw(self.teacher.unet)
        drawn = self._draw(student)
        if not self.accelerator.is_main_process:
            return
        captions = [prompt.caption for prompt in self.prompts]
        columns = [self._drawn_by_teacher[: self.rows], drawn[: self.rows]]
        grid = evaluation.image_grid(columns, ["teacher", f"student, step {step}"], captions[: self.rows])
        self.folder.mkdir(parents=True, exist_ok=True)
        grid.save(self.folder / f"{name}-{step}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({f"{name}/validation": np.asarray(grid)[None]}, tracked_step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({f"{name}/validation": [grid]}, tracked_step)
        if self.scorer is not None:
            self._score(self.scorer, name, step, tracked_step, drawn)

    def _score(self, scorer: Callable, name: str, step: int, tracked_step: int, drawn: np.ndarray) -> None:
        categories = [prompt.category for prompt in self.prompts]
        scores = judge(scorer, drawn, [prompt.spec for prompt in self.prompts])
        overall = evaluation.bootstrap_scores(scores, categories)["overall"]
        print(
            f"{name}, step {step}: compositional score {overall.value:.3f} ({overall.low:.3f} to {overall.high:.3f})"
        )
        self.accelerator.log({f"{name}/compositional": overall.value}, tracked_step)

    def _draw(self, unet: ModelMixin) -> np.ndarray:
        """(prompts, height, width, 3) uint8, by the teacher's pipeline with `unet` in it."""
        teacher, self.teacher.unet = self.teacher.unet, unet
        captions = [prompt.caption for prompt in self.prompts]
        try:
            with self.accelerator.autocast():
                return evaluation.generate_images(self.teacher, captions, self.sampling, progress=False)
        finally:
            self.teacher.unet = teacher
