"""Running the pipeline on the calibration prompts, and gathering moments along the way."""

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
from ..utils.seeds import cpu_generator, derived_seed
from .calls import Call, recording
from .moments import InputMoments, sample_inputs
from .noising import Noising, check_scheduler

# Positions of a picture that count in each call: neighbours see nearly the same.
_POSITIONS = 64

# Arguments of pipelines that start from a picture.
_PICTURES = {"strength", "mask_image", "image_guidance_scale", "controlnet_conditioning_scale"}

_NOISE_STREAM, _POSITION_STREAM, _PROMPT_STREAM, _TUNING_STREAM = range(4)


def check_pipeline(pipeline: Any, tunes: bool = False) -> None:
    """Refuse what cannot be run on prompts.

    Args:
        pipeline: what a user gave.
        tunes: whether its pictures are to be noised anew as well.

    Raises:
        ValueError: not a pipeline; one that takes no prompt, or pictures as well; to be tuned, and its scheduler
            has no noise schedule.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise ValueError(
            f"Calibration runs the whole pipeline, and a {type(pipeline).__name__} alone cannot be run: pass the "
            "pipeline that it belongs to, as in quantize_model(pipeline, config, calibration=...)."
        )
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"Calibration draws prompts, and {type(pipeline).__name__} takes none.")
    if pictures := sorted(_PICTURES & inspect.signature(pipeline.__call__).parameters.keys()):
        raise ValueError(
            f"Calibration draws prompts alone, and {type(pipeline).__name__} starts from pictures (it takes "
            f"{', '.join(pictures)}). Calibrate the text-to-image pipeline of this model: "
            "AutoPipelineForText2Image.from_pipe(pipeline)."
        )
    if tunes:
        check_scheduler(pipeline.scheduler)


class Denoising:
    """The calibration run of a pipeline, batch by batch; a batch's inputs depend on its number alone.

    Args:
        pipeline: as the user has set it up: device, dtype, scheduler.
        model: its component to watch.
        calibration: what to run.
    """

    def __init__(self, pipeline: DiffusionPipeline, model: ModelMixin, calibration: Calibration):
        self.pipeline = pipeline
        self.model = model
        self.calibration = calibration
        self._prompts = _choose_prompts(calibration)

    @property
    def num_batches(self) -> int:
        return -(-len(self._prompts) // self.calibration.batch_size)

    def gather(self, batch: int, moments: Mapping[str, InputMoments], on_call: Callable[[], Any]) -> None:
        """Draw the pictures of a batch and count the inputs of the layers named in `moments` in.

        `on_call` is called after each call of the model.

        Raises:
            ValueError: a layer's input holds NaN or infinite values; the message names the first such layer.
        """
        generator = cpu_generator(derived_seed(self.calibration.seed, batch, _POSITION_STREAM))
        called: dict[str, InputMoments] = {}  # in the order of execution

        def watching(name: str) -> Callable[..., None]:
            def watch(layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
                called[name] = moments[name]
                moments[name].add(sample_inputs(layer, inputs[0], _POSITIONS, generator))

            return watch

        def after_call(*_: Any) -> None:
            _check_finite(called)
            on_call()

        hooks = [self.model.get_submodule(name).register_forward_pre_hook(watching(name)) for name in moments]
        hooks.append(self.model.register_forward_hook(after_call))
        try:
            with _quiet(self.pipeline), _without_half(self.pipeline):
                self._draw(batch)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def record(self, batch: int, count: int, timesteps: Sequence[float] | None = None) -> list[Call]:
        """Draw the pictures of a batch, noise them anew `count` times, and let the model predict.

        Each row of a call gets noise and a timestep of its own, one of `timesteps` if given; text and guidance stay as
        the pipeline gave them in its calls, one after another.

        Raises:
            ValueError: the model does not take the latents alone.
        """
        noising = Noising(
            self.pipeline.scheduler, derived_seed(self.calibration.seed, batch, _TUNING_STREAM), timesteps
        )
        with _quiet(self.pipeline), _without_half(self.pipeline):
            with recording(self.model) as calls:
                latents = self._draw(batch)
            return [noising.repeat(call, latents, self.model) for call in islice(cycle(calls), count)]

    def _draw(self, batch: int) -> Tensor:
        """Final latents [pictures, ...] of a batch."""
        calibration = self.calibration
        first = batch * calibration.batch_size
        prompts = self._prompts[first : first + calibration.batch_size]
        seeds = [derived_seed(calibration.seed, first + i, _NOISE_STREAM) for i in range(len(prompts))]
        guidance = {} if calibration.guidance_scale is None else {"guidance_scale": calibration.guidance_scale}
        return self.pipeline(
            prompt=prompts,
            num_inference_steps=calibration.num_inference_steps,
            generator=[cpu_generator(seed) for seed in seeds],
            output_type="latent",
            return_dict=False,
            **guidance,
        )[0]


def _check_finite(called: Mapping[str, InputMoments]) -> None:
    """After each call: before NaN reaches the next call's input, and with it every layer."""
    for name, moments in called.items():
        if not moments.is_finite:
            raise ValueError(
                f"The input of {name} holds NaN or infinite values while the pipeline draws. Calibrate in a dtype "
                "that the model can run in; torch.float32 is the safest."
            )


def _choose_prompts(calibration: Calibration) -> list[str]:
    """A prompt for each sample, in random order, since lists are often sorted; again only when all have been used."""
    prompts = default_prompts() if calibration.prompts is None else calibration.prompts
    order = np.random.default_rng(derived_seed(calibration.seed, 0, _PROMPT_STREAM)).permutation(len(prompts))
    return [prompts[order[i % len(prompts)]] for i in range(calibration.num_samples)]


@contextmanager
def _quiet(pipeline: DiffusionPipeline) -> Iterator[None]:
    """The pipeline without its own progress bars."""
    shown = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**shown | {"disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**shown)


@contextmanager
def _without_half(pipeline: DiffusionPipeline) -> Iterator[None]:
    """fp16 on a CPU, which is slow or lacks operations there, as fp32 for the while."""
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
