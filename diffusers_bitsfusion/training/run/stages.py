"""The run: teacher and student, Stage I, Stage II, and the packed pipeline in OUTPUT_DIR beside their checkpoints.

Stage I distils the full-precision model into the quantized one; Stage II trains it to predict noise.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from diffusers import DDPMScheduler, ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo

from ...utils.durations import as_duration
from ...utils.hub import explaining_refusals
from ...utils.processes import failing_together
from ...utils.timesteps import TimestepDistribution
from ..batches import Batches, Sharing
from ..checkpoints import fingerprint, load_weights, read_settings
from ..loop import LoopOptions, Objective, TrainingLoop
from ..losses import Distillation, NoisePrediction
from ..measure import Estimate, estimate, measure_timestep_errors, static_memory
from ..optimizer import make_optimizer
from ..prompt_embeddings import TextEncoder
from ..rate import PricedCodes
from ..sharding import ShardedModel
from ..timestep_errors import TimestepErrors
from .data import calibration_prompts, make_batches, open_training_images
from .models import calibrate_student, calibration_time, load_teacher, prepare_student, priced_from
from .saving import save_pipeline
from .stage_arguments import checkpoint_of, end_of_stage_1, learning_rate, of_stage, stages, stages_left
from .validation import Validation

logger = get_logger(__name__)

ERRORS_FILE = "timestep_error.json"


class Training:
    """A run by the arguments of the command line: the teacher's pipeline, the student, and the stages of training."""

    @failing_together()
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, Path(args.output_dir)
        self.kept_stage_1 = False
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            cpu=not torch.accelerator.is_available(),  # Several processes without a GPU would not connect otherwise.
            log_with=args.report_to,
            project_config=ProjectConfiguration(args.output_dir, str(self.folder / args.logging_dir)),
        )
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                "Launch the training without accelerate's FSDP and DeepSpeed (`accelerate launch --multi_gpu`). With "
                "--shard the processes shard the model."
            )
        self.hub = {"repo_id": args.hub_model_id or self.folder.name, "token": args.hub_token}
        if args.push_to_hub and self.accelerator.is_main_process:
            # The repository is created now, so that a token without rights fails before days of training.
            with explaining_refusals(self.hub["repo_id"]):
                self.hub["repo_id"] = create_repo(**self.hub, exist_ok=True).repo_id
        set_seed(args.seed)
        torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
        self.teacher = load_teacher(args, self.accelerator)
        self.scheduler = DDPMScheduler.from_config(self.teacher.scheduler.config)
        self.text = TextEncoder(self.teacher.tokenizer, self.teacher.text_encoder)
        self.student = prepare_student(args)
        self.free_rate = priced_from(args, self.student, self.teacher)
        self.fingerprint = fingerprint(self.student)
        with self.accelerator.main_process_first():  # One process downloads and converts for all.
            self.images = open_training_images(args, self.teacher)
        self.validation = Validation.from_args(args, self.teacher, self.accelerator)

    @failing_together()
    def run(self) -> None:
        """Run all stages, then save the packed pipeline."""
        args = self.args
        if args.measure_timestep_error:
            self._measure_timestep_errors().plot(self.folder / "timestep_error.png")
            return
        settings = {name: str(value) for name, value in vars(args).items() if name != "hub_token"}
        self.accelerator.init_trackers(args.tracker_project_name, settings)
        if args.estimate_only or not args.quiet:
            self._print_estimates()
        if not args.estimate_only:
            for stage in stages_left(args):
                self._run_stage(stage)
            self._save_pipeline()
        self.accelerator.end_training()

    @property
    def _calibration(self) -> dict[str, Any] | None:
        """Summary of the calibration that the student started from, for the packed pipeline's config."""
        return None if self.args.full_precision else self.student.qat_state.config.calibration

    def _restore_calibration(self, checkpoint: Path) -> None:
        if not self.args.full_precision:
            self.student.qat_state.config.calibration = read_settings(checkpoint)[1].get("calibration")

    def _load_stage_1(self) -> None:
        """Load the weights that Stage I ended with."""
        if self.args.init_from == "rounding":
            return
        path = end_of_stage_1(self.args)
        if path is None and self.args.full_precision:
            return  # The control of Stage II starts from the original.
        if path is None:
            raise FileNotFoundError(
                f"{self.folder / 'stage1'} holds no checkpoint to start Stage II from. Run Stage I, name one with "
                "--init_from, or start from rounded weights with --init_from rounding."
            )
        load_weights(self.student, path, self.fingerprint)
        self._restore_calibration(path)

    def _sharing(self, stage: int) -> Sharing:
        return Sharing(
            self.args.train_batch_size,
            of_stage(self.args, "gradient_accumulation_steps", stage),
            self.accelerator.num_processes,
            self.accelerator.process_index,
        )

    def _batches(self, stage: int, distribution: TimestepDistribution) -> Batches:
        parts = self.images, self.teacher, self.text, self.scheduler, distribution, self._sharing(stage)
        return make_batches(self.args, stage, *parts)

    def _distribution(self) -> TimestepDistribution:
        count = self.scheduler.config.num_train_timesteps
        if self.args.timestep_sampling == "uniform":
            return TimestepDistribution.uniform(count)
        if self.args.timestep_sampling == "beta":
            return TimestepDistribution.beta(count, self.args.timestep_alpha)
        file = self.folder / ERRORS_FILE
        errors = TimestepErrors.load(file) if file.exists() else self._measure_timestep_errors()
        return errors.distribution(count)

    def _measure_timestep_errors(self) -> TimestepErrors:
        """Measure the errors of the rounded model along the timesteps, and save them in OUTPUT_DIR."""
        uniform = TimestepDistribution.uniform(self.scheduler.config.num_train_timesteps)
        student = self.student.to(self.accelerator.device)
        errors = measure_timestep_errors(
            self.accelerator,
            student,
            self.teacher.unet,
            self._batches(1, uniform),
            self.scheduler,
            self.args.timestep_error_samples,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            errors.save(self.folder / ERRORS_FILE)
        return errors

    def _run_stage(self, stage: int) -> None:
        args, name = self.args, f"stage{stage}"
        set_seed(args.seed)  # States of generators are saved; they are the same where Stage I ran in another process.
        checkpoint = checkpoint_of(args, stage)
        if checkpoint is not None:
            self._restore_calibration(checkpoint)
        elif args.stage == "2":
            self._load_stage_1()
        elif self._calibrates(stage):
            calibrate_student(args, self.student, self.teacher, calibration_prompts(args, self.images))
        loop = self._make_loop(stage, self._distribution())
        if checkpoint is not None:
            loop.resume(checkpoint)
        validation = self.validation
        student, offset = loop.student, loop.options.tracker_offset
        loop.train(None if validation is None else validation.of_stage(name, student, offset))
        if loop.batches.skipped:
            logger.warning("%d images did not decode and were skipped.", len(loop.batches.skipped))
        self.student = loop.finish()
        if stage == 2 and self.accelerator.is_main_process:
            self._keep_the_better()

    @torch.no_grad()
    def _keep_the_better(self) -> None:
        """Put the weights of Stage I's end back where Stage II has lowered the validation's score."""
        path, validation = end_of_stage_1(self.args), self.validation
        if path is None or validation is None or not validation.has_scored("stage2"):
            return
        trained = {name: tensor.clone() for name, tensor in self.student.state_dict().items()}

        def load_stage_1() -> ModelMixin:
            load_weights(self.student, path, self.fingerprint)
            return self.student

        change = validation.change("stage1", "stage2", load_stage_1)
        if change.after < change.before:
            load_stage_1()
            self.kept_stage_1 = True
            print(
                f"Stage II lowered the compositional score of the validation from {change.before:.3f} to "
                f"{change.after:.3f}: the pipeline is saved with the weights that Stage I ended with. Those of Stage "
                f"II are in {self.folder / 'stage2'}."
            )
        else:
            self.student.load_state_dict(trained)

    def _calibrates(self, stage: int) -> bool:
        """Return whether a stage that begins anew starts from calibrated weights."""
        return stage == 1 and self.args.init == "calibrated"

    def _print_estimates(self) -> None:
        """Print what each stage that is left takes in time and memory, and the time of all, calibration included."""
        args, total = self.args, 0.0
        uniform = TimestepDistribution.uniform(self.scheduler.config.num_train_timesteps)
        for stage in stages_left(args):
            checkpoint = checkpoint_of(args, stage)
            if checkpoint is None and self._calibrates(stage):
                prompts = calibration_prompts(args, self.images)
                calibration = calibration_time(args, self.student, self.teacher, prompts)
                self.accelerator.print(calibration)
                total += calibration.total
            loop = self._make_loop(stage, uniform)
            loop.step = 0 if checkpoint is None else read_settings(checkpoint)[0]
            if loop.step < loop.options.max_train_steps:
                cost = self._estimate(loop)
                self.accelerator.print(f"Stage {stage}, {loop.batches.sharing.total} samples a step: {cost}")
                total += cost.total_seconds
            self.student = loop.finish()
        self.accelerator.print(f"In all about {as_duration(total)}, loading and saving not counted.")

    def _estimate(self, loop: TrainingLoop) -> Estimate:
        """Return the time and memory of a stage from trials, validation included."""
        args, options = self.args, loop.options
        frozen = (self.teacher.unet, self.teacher.vae, self.teacher.text_encoder)
        memory = static_memory(loop.student, frozen, args.use_ema, 2 if args.use_8bit_adam else 8)
        cost = estimate(loop, memory)
        if self.validation is None or not options.validation_steps:
            return cost
        every, last = options.validation_steps, options.max_train_steps
        count = -(-last // every) - loop.step // every + 1  # The teacher samples once more.
        with loop.averaged():
            return replace(cost, validations=count, seconds_per_validation=self.validation.seconds(loop.student))

    def _make_loop(self, stage: int, distribution: TimestepDistribution) -> TrainingLoop:
        """Return the loop of a stage at its first step."""
        args = self.args
        batches = self._batches(stage, distribution)
        student = self.student.to(self.accelerator.device)
        sharded = ShardedModel(self.accelerator, student) if args.shard else None
        distils = stage == 1
        objective = self._objective(student, stage)
        optimizer = make_optimizer(
            student,
            learning_rate(args, stage),
            (args.adam_beta1, args.adam_beta2),
            args.adam_weight_decay,
            args.adam_epsilon,
            args.use_8bit_adam,
        )
        settings = {"stage": stage, "model": self.fingerprint, "batch": batches.sharing.total}
        steps = of_stage(args, "max_train_steps", stage)
        options = LoopOptions(
            max_train_steps=steps,
            max_grad_norm=args.max_grad_norm,
            checkpointing_steps=args.checkpointing_steps,
            checkpoints_total_limit=args.checkpoints_total_limit,
            validation_steps=args.validation_steps,
            tracker_offset=0 if distils else args.max_train_steps,
            progress=not args.quiet,
        )
        return TrainingLoop(
            self.accelerator,
            sharded or student,
            objective,
            batches,
            optimizer,
            get_scheduler(
                args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=steps
            ),
            self.folder / f"stage{stage}",
            settings | {"seed": args.seed, "use_ema": args.use_ema, "calibration": self._calibration},
            options,
            EMAModel(student.parameters(), decay=args.ema_decay) if args.use_ema else None,
        )

    def _objective(self, student: ModelMixin, stage: int) -> Objective:
        args, teacher = self.args, self.teacher.unet
        objective = Distillation(student, teacher, args.feature_weight) if stage == 1 else NoisePrediction()
        if not args.rate_weight or (stage == 2 and args.target_bytes is None):
            return objective
        return PricedCodes(objective, student, args.rate_weight, self.free_rate)

    def _save_pipeline(self) -> None:
        if self.accelerator.is_main_process:
            description = None if self.args.full_precision else self._description()
            save_pipeline(self.args, self.student.cpu(), self.teacher.scheduler, description, self.hub)

    def _description(self) -> str:
        """Return the model card's description of the training."""
        done = []
        for stage in stages(self.args):
            steps, samples = of_stage(self.args, "max_train_steps", stage), self._sharing(stage).total
            done.append(f"Stage {stage}: {steps} steps of {samples} samples.")
        if self.kept_stage_1:
            done.append("Stage 2 lowered the score in validation, so the weights are those of Stage 1.")
        return f"Trained in this precision. {' '.join(done)}\n\n```bash\n{self.args.command}\n```"
