"""Batches from prompts alone: the teacher draws the latents that the student is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, ModelMixin, SchedulerMixin
from torch import Tensor

from ..utils.timesteps import TimestepDistribution
from .batches import STREAM_DRAWING, Batches, Sharing, generator_of, sample_at
from .losses import predict
from .prompt_embeddings import TextEncoder


class DrawnBatches(Batches):
    """Latents that the teacher draws, in turn with training.

    A set has a drawing for each sample of a step and serves `renewed_every` steps, with other noise and timesteps at
    each. The teacher draws it by DPM-Solver++ under classifier-free guidance, from noise that depends on the seed and
    the drawing's number in the run, so that a continued run draws its set again and nothing of it is kept.

    Args:
        prompts: what to draw.
        teacher: the full-precision model.
        text, scheduler, distribution, sharing: see `Batches`.
        latent_shape: (channels, height, width).
        num_inference_steps: of a drawing.
        guidance_scale: of the drawings; it does not enter the loss.
        renewed_every: steps that a set serves.
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
    ):
        super().__init__(text, scheduler, distribution, sharing, **options)
        self.prompts, self.teacher, self.latent_shape = prompts, teacher, latent_shape
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.renewed_every = renewed_every
        self._solver = DPMSolverMultistepScheduler.from_config(scheduler.config, timestep_spacing="trailing")
        self._step = self._micro = 0
        self._captions: list[list[str]] = []  # of the set, for each forward pass of a step
        self._drawings: list[Tensor] = []

    def start(self, step: int) -> None:
        self._step, self._micro = step, 0
        self._draw(step // self.renewed_every)

    def _samples(self) -> list[dict[str, Any]]:
        if self._micro == self.sharing.accumulation:
            self._step, self._micro = self._step + 1, 0
            if self._step % self.renewed_every == 0:
                self._draw(self._step // self.renewed_every)
        places, micro = self.sharing.places(self._micro), self._micro
        self._micro += 1
        return [
            {"position": self._step * self.sharing.total + place, "caption": caption, "latents": latents}
            for place, caption, latents in zip(places, self._captions[micro], self._drawings[micro], strict=True)
        ]

    def _latents(self, samples: list[dict[str, Any]], generators: list[torch.Generator]) -> Tensor:
        return torch.stack([sample["latents"] for sample in samples])

    def _draw(self, number: int) -> None:
        """This process's share of a set."""
        self._captions, self._drawings = [], []
        for micro in range(self.sharing.accumulation):
            drawings = [number * self.sharing.total + place for place in self.sharing.places(micro)]
            captions = [self.prompts[sample_at(self.seed, drawing, len(self.prompts))] for drawing in drawings]
            generators = [generator_of(self.seed, STREAM_DRAWING, drawing) for drawing in drawings]
            noise = torch.stack([torch.randn(self.latent_shape, generator=generator) for generator in generators])
            self._captions.append(captions)
            self._drawings.append(self._drawn(noise.to(self.device), captions))

    @torch.no_grad()
    def _drawn(self, latents: Tensor, captions: list[str]) -> Tensor:
        given = self.text.encode(captions)
        without = self.text.replace_by_empty(given, torch.ones(len(captions), dtype=torch.bool))
        self._solver.set_timesteps(self.num_inference_steps, device=self.device)
        for timestep in self._solver.timesteps:
            timesteps = timestep.expand(len(latents))
            conditional, empty = (
                predict(self.teacher, latents, timesteps, states).float() for states in (given, without)
            )
            guided = empty + self.guidance_scale * (conditional - empty)
            latents = self._solver.step(guided, timestep, latents).prev_sample
        return latents
