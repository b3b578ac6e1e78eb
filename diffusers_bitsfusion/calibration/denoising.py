"""Sampling of the pipeline on the calibration prompts, which gathers moments of the layers' inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ..config.calibration import Calibration, default_prompts
from ..utils.private_names import DIFFUSERS_PROGRESS
from ..utils.seeds import cpu_generator, derived_seed
from .calls import Call, recording
from .moments import InputMoments, sample_inputs
from .noisy_calls import NoisyCalls, check_scheduler

# Number of positions of an image that count in each call; neighbouring positions see nearly the same.
_POSITIONS = 64

# Names of the arguments by which a pipeline that starts from an image is known.
_IMAGE_ARGUMENTS = {"strength", "mask_image", "image_guidance_scale", "controlnet_conditioning_scale"}

# Streams of random numbers, one for each use of the calibration's seed.
_NOISE_STREAM, _POSITION_STREAM, _PROMPT_STREAM, _TUNING_STREAM = range(4)


def check_pipeline(pipeline: Any, tunes: bool = False) -> None:
    """Refuse a pipeline that cannot be run on prompts.

    Args:
        pipeline: the object that a user passed.
        tunes: whether its images are to be used for tuning, with noise added.

    Raises:
        ValueError: it is no pipeline, it accepts no prompt, it starts from images, or it is to be tuned and its
            scheduler has no noise schedule.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise ValueError(
            f"Calibration runs the whole pipeline, and a {type(pipeline).__name__} alone cannot be run: pass the "
            "pipeline that it belongs to, as in quantize_model(pipeline, config, calibration=...)."
        )
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"Calibration runs on prompts, and {type(pipeline).__name__} takes none.")
    if image_arguments := sorted(_IMAGE_ARGUMENTS & inspect.signature(pipeline.__call__).parameters.keys()):
        raise ValueError(
            f"Calibration runs on prompts alone, and {type(pipeline).__name__} starts from images (it takes "
            f"{', '.join(image_arguments)}). Calibrate the text-to-image pipeline of this model: "
            "AutoPipelineForText2Image.from_pipe(pipeline)."
        )
    if tunes:
        check_scheduler(pipeline.scheduler)


class Denoising:
    """The calibration run of a pipeline, batch by batch; a batch's inputs depend on its index alone.

    Args:
        pipeline: pipeline with the device, dtype and scheduler that the user has set.
        model: component of the pipeline whose inputs are observed.
        calibration: settings of the run.
    """

    def __init__(self, pipeline: DiffusionPipeline, model: ModelMixin, calibration: Calibration) -> None:
        self.pipeline = pipeline
        self.model = model
        self.calibration = calibration
        self._prompts = _choose_prompts(calibration)

    @property
    def num_batches(self) -> int:
        """Number of batches that all images make."""
        return -(-len(self._prompts) // self.calibration.batch_size)

    def gather(self, batch: int, moments: Mapping[str, InputMoments], on_call: Callable[[], Any]) -> None:
        """Sample the images of a batch and add the inputs of the layers named in `moments` to them.

        Args:
            batch: index of the batch.
            moments: moments by layer name, changed in place.
            on_call: called after each call of the model.

        Raises:
            ValueError: a layer's input holds NaN or infinite values; the message names the first such layer.
        """
        generator = cpu_generator(derived_seed(self.calibration.seed, batch, _POSITION_STREAM))
        called: dict[str, InputMoments] = {}  # Layers stand in the order of execution.

        def input_hook(name: str) -> Callable[..., None]:
            def hook(layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
                called[name] = moments[name]
                moments[name].add(sample_inputs(layer, inputs[0], _POSITIONS, generator))

            return hook

        def after_call(*_: Any) -> None:
            _check_finite(called)
            on_call()

        hooks = [self.model.get_submodule(name).register_forward_pre_hook(input_hook(name)) for name in moments]
        hooks.append(self.model.register_forward_hook(after_call))
        try:
            with _quiet(self.pipeline), _without_half(self.pipeline):
                self._sample(batch)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def record(self, batch: int, count: int, timesteps: Sequence[float] | None = None) -> list[Call]:
        """Sample the images of a batch, add noise to them `count` times, and let the model predict.

        Each row of a call has its own noise and timestep. Text and guidance are those of the pipeline's own calls, one
        after another.

        Args:
            batch: index of the batch.
            count: number of calls to return.
            timesteps: timesteps to choose from; None for all of the scheduler's.

        Raises:
            ValueError: the model does not accept the latents alone.
        """
        seed = derived_seed(self.calibration.seed, batch, _TUNING_STREAM)
        noisy = NoisyCalls(self.pipeline.scheduler, seed, timesteps)
        with _quiet(self.pipeline), _without_half(self.pipeline):
            with recording(self.model) as calls:
                latents = self._sample(batch)
            return [noisy.repeat(call, latents, self.model) for call in islice(cycle(calls), count)]

    def _sample(self, batch: int) -> Tensor:
        """Return the final latents [images, ...] of a batch."""
        calibration = self.calibration
        first = batch * calibration.batch_size
        prompts = self._prompts[first : first + calibration.batch_size]
        seeds = [derived_seed(calibration.seed, first + i, _NOISE_STREAM) for i in range(len(prompts))]
        guidance = {} if calibration.guidance_scale is None else {"guidance_scale": calibration.guidance_scale}
        latents: Tensor = self.pipeline(
            prompt=prompts,
            num_inference_steps=calibration.num_inference_steps,
            generator=[cpu_generator(seed) for seed in seeds],
            output_type="latent",
            return_dict=False,
            **guidance,
        )[0]
        return latents


def _check_finite(called: Mapping[str, InputMoments]) -> None:
    """Refuse inputs that are not finite after each call, before the next call passes them on to every layer."""
    for name, moments in called.items():
        if not moments.is_finite:
            raise ValueError(
                f"The input of {name} holds NaN or infinite values while the pipeline samples. Calibrate in a dtype "
                "that the model can run in; torch.float32 is the safest."
            )


def _choose_prompts(calibration: Calibration) -> list[str]:
    """Choose a prompt for each sample in random order, since lists are often sorted; repeat only when all are used."""
    prompts = default_prompts() if calibration.prompts is None else calibration.prompts
    order = np.random.default_rng(derived_seed(calibration.seed, 0, _PROMPT_STREAM)).permutation(len(prompts))
    return [prompts[order[i % len(prompts)]] for i in range(calibration.num_samples)]


@contextmanager
def _quiet(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Hide the pipeline's own progress bars within the block."""
    shown = DIFFUSERS_PROGRESS.read(pipeline, {})
    pipeline.set_progress_bar_config(**shown | {"disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**shown)


@contextmanager
def _without_half(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Compute in fp32 within the block where a module is in fp16 on a CPU, which is slow or lacks operations there."""
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    halves = [(t, t.data) for t in tensors if t.dtype == torch.float16 and t.device.type == "cpu"]
    for tensor, half in halves:
        tensor.data = half.float()
    try:
        yield
    finally:
        for tensor, half in halves:
            tensor.data = half
