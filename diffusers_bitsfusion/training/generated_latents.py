"""Batches from prompts alone: the teacher generates the latents that the student is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, ModelMixin, SchedulerMixin
from torch import Tensor

from ..utils.timesteps import TimestepDistribution
from .batches import STREAM_SAMPLING, Batches, Sharing, generator_of, sample_at
from .losses import predict
from .prompt_embeddings import TextEncoder


class GeneratedBatches(Batches):
    """Batches from latents that the teacher generates, in turn with training.

    A set has a latent for each sample of a step, and is used for `renewed_every` steps, with other noise and timesteps
    at each. The teacher generates it by DPM-Solver++ (arXiv 2211.01095) under classifier-free guidance, from noise
    that depends on the seed and the latent's number in the run. So a continued run generates its set again, and
    checkpoints need not hold it.

    Args:
        prompts: prompts of the latents.
        teacher: full-precision model.
        text: see `Batches`.
        scheduler: see `Batches`.
        distribution: see `Batches`.
        sharing: see `Batches`.
        latent_shape: (channels, height, width).
        num_inference_steps: number of steps of the solver.
        guidance_scale: guidance scale of sampling, which the loss does not use.
        renewed_every: number of steps that a set is used for.
        **options: see `Batches`.
    """

    renewed_every: int

    def __init__(
        self,
        prompts: Sequence[str],
        teacher: ModelMixin,
        text: TextEncoder,
        scheduler: SchedulerMixin,
        distribution: TimestepDistribution,
        sharing: Sharing,
        latent_shape: tuple[int, int, int],
        *,
        num_inference_steps: int = 10,
        guidance_scale: float = 7.5,
        renewed_every: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(text, scheduler, distribution, sharing, **options)
        self.prompts, self.teacher, self.latent_shape = prompts, teacher, latent_shape
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.renewed_every = renewed_every
        self._solver = DPMSolverMultistepScheduler.from_config(scheduler.config, timestep_spacing="trailing")
        self._step = self._micro = 0
        # Captions and latents of the set, for each forward pass of a step.
        self._captions: list[list[str]] = []
        self._generated: list[Tensor] = []

    def start(self, step: int) -> None:
        """Let `next` continue from the first forward pass of `step`, after generating its set."""
        self._step, self._micro = step, 0
        self._generate(step // self.renewed_every)

    def _samples(self) -> list[dict[str, Any]]:
        if self._micro == self.sharing.accumulation:
            self._step, self._micro = self._step + 1, 0
            if self._step % self.renewed_every == 0:
                self._generate(self._step // self.renewed_every)
        places, micro = self.sharing.places(self._micro), self._micro
        self._micro += 1
        return [
            {"position": self._step * self.sharing.total + place, "caption": caption, "latents": latents}
            for place, caption, latents in zip(places, self._captions[micro], self._generated[micro], strict=True)
        ]

    def _latents(self, samples: list[dict[str, Any]], generators: list[torch.Generator]) -> Tensor:
        return torch.stack([sample["latents"] for sample in samples])

    def _generate(self, number: int) -> None:
        """Generate this process's share of set `number`."""
        self._captions, self._generated = [], []
        for micro in range(self.sharing.accumulation):
            indices = [number * self.sharing.total + place for place in self.sharing.places(micro)]
            captions = [self.prompts[sample_at(self.seed, index, len(self.prompts))] for index in indices]
            generators = [generator_of(self.seed, STREAM_SAMPLING, index) for index in indices]
            noise = torch.stack([torch.randn(self.latent_shape, generator=generator) for generator in generators])
            self._captions.append(captions)
            self._generated.append(self._sample(noise.to(self.device), captions))

    @torch.no_grad()
    def _sample(self, latents: Tensor, captions: list[str]) -> Tensor:
        """Return the latents that the teacher samples from noise [batch, channels, height, width]."""
        given = self.text.encode(captions)
        empty = self.text.replace_by_empty(given, torch.ones(len(captions), dtype=torch.bool))
        self._solver.set_timesteps(self.num_inference_steps, device=self.device)
        for timestep in self._solver.timesteps:
            timesteps = timestep.expand(len(latents))
            conditional, unconditional = (
                predict(self.teacher, latents, timesteps, states).float() for states in (given, empty)
            )
            prediction = unconditional + self.guidance_scale * (conditional - unconditional)
            latents = self._solver.step(prediction, timestep, latents).prev_sample
        return latents
