"""Batches from prompts alone: the teacher walks from noise to image, and the student is trained along the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor

from ..timesteps import TimestepDistribution
from .batches import STREAM_NOISE, STREAM_WALK, Batch, Sharing, generator_of, sample_at
from .losses import predict
from .text import TextEncoder


@dataclass
class WalkBatch(Batch):
    """A `Batch` that knows the other half of classifier-free guidance.

    Attributes:
        other_states: [batch, tokens, width], the caption's where `states` are the empty text's, and the other way.
        dropped: bool [batch], where `states` are the empty text's.
    """

    other_states: Tensor = field(kw_only=True)
    dropped: Tensor = field(kw_only=True)


class WalkBatches:
    """As many walks as a step has samples. Each step trains on where they are, then lets the teacher take a step.

    A walk goes from noise to image in `walk_steps` steps of DDIM under classifier-free guidance, at timesteps that are
    quantiles of `distribution`, shifted at random from walk to walk, so that training visits timesteps as that says.
    The first walks are cut to different lengths, coarser ones, so that afterwards a batch has walks at every stage.
    The teacher's prediction for the loss is half of what guidance needs: a step costs one forward pass more.

    Args:
        prompts: what to draw.
        teacher: the full-precision model.
        text: encodes prompts.
        scheduler: gives the noise schedule and what the model predicts.
        distribution: of timesteps.
        sharing: how batches are shared out.
        latent_shape: (channels, height, width).
        walk_steps: steps of a walk, at least 2.
        guidance_scale: of the walks; it does not enter the loss.
        text_dropout: probability that the models are compared on the empty text.
        seed: of everything random.
        device: where batches go.
    """

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
        walk_steps: int = 10,
        guidance_scale: float = 7.5,
        text_dropout: float = 0.1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.prompts, self.teacher, self.text = prompts, teacher, text
        self.distribution, self.sharing, self.latent_shape = distribution, sharing, latent_shape
        self.walk_steps, self.guidance_scale = walk_steps, guidance_scale
        self.text_dropout, self.seed, self.device = text_dropout, seed, device
        self.prediction_type = scheduler.config.prediction_type
        self.alphas_cumprod = scheduler.alphas_cumprod.to(device, torch.float32)
        self.skipped: set[int] = set()
        self._step = self._micro = 0
        # Latents of this process's walks, for each forward pass of a step.
        self._latents = torch.zeros(sharing.accumulation, sharing.batch_size, *latent_shape, device=device)

    def start(self, step: int) -> None:
        """Let `next` continue from the first forward pass of `step`, with the latents that `load_state` gave."""
        self._step, self._micro = step, 0

    def next(self) -> WalkBatch:
        """Where this process's walks of the next forward pass are."""
        latents = self._latents[self._micro]
        places = self.sharing.places(self._micro)
        walks = [self._walk(place) for place in places]
        for row, walk in enumerate(walks):
            if walk.place == 0:
                latents[row] = torch.randn(self.latent_shape, generator=self._generator(walk))
        positions = [self._step * self.sharing.total + place for place in places]
        draws = [torch.rand(1, generator=generator_of(self.seed, STREAM_NOISE, position)) for position in positions]
        dropped = torch.cat(draws) < self.text_dropout
        captions = [self.prompts[sample_at(self.seed, walk.number, len(self.prompts))] for walk in walks]
        full = self.text.encode(captions)
        return WalkBatch(
            positions,
            captions,
            latents.clone(),
            torch.stack([self._timesteps(walk)[walk.place] for walk in walks]).to(self.device),
            self.text.replace_by_empty(full, dropped),
            other_states=self.text.replace_by_empty(full, ~dropped),
            dropped=dropped.to(self.device),
        )

    @torch.no_grad()
    def advance(self, batch: Batch, teacher: Tensor | None) -> None:
        """Take the teacher's step from `batch`, given what it predicted there."""
        assert isinstance(batch, WalkBatch) and teacher is not None
        other = predict(self.teacher, batch.noisy, batch.timesteps, batch.other_states).float()
        dropped = batch.dropped.view(-1, 1, 1, 1)
        teacher = teacher.float()
        without, given = torch.where(dropped, teacher, other), torch.where(dropped, other, teacher)
        guided = without + self.guidance_scale * (given - without)
        walks = [self._walk(place) for place in self.sharing.places(self._micro)]
        following = torch.stack([self._timesteps(walk)[walk.place + 1] for walk in walks]).to(self.device)
        self._latents[self._micro] = self._ddim(batch.noisy, guided, batch.timesteps, following)
        self._micro += 1
        if self._micro == self.sharing.accumulation:
            self._step, self._micro = self._step + 1, 0

    def state(self) -> Tensor:
        """Latents of this process's walks, fp32 [accumulation, batch, channels, height, width]."""
        return self._latents

    def load_state(self, state: Tensor) -> None:
        """Inverse of `state`."""
        self._latents.copy_(state)

    def _walk(self, place: int) -> _Walk:
        """Where the walk at `place` in the step's batch is now."""
        total = self.sharing.total
        first = 2 + place * (self.walk_steps - 2) // max(total - 1, 1)
        if self._step < first:
            return _Walk(place, self._step, first)
        count, at = divmod(self._step - first, self.walk_steps)
        return _Walk((count + 1) * total + place, at, self.walk_steps)

    def _generator(self, walk: _Walk) -> torch.Generator:
        return generator_of(self.seed, STREAM_WALK, 2 * walk.number)

    def _timesteps(self, walk: _Walk) -> Tensor:
        """Timesteps int64 [length + 1] of a walk, falling: the last one first, then quantiles, at the end -1."""
        shift = torch.rand(1, generator=generator_of(self.seed, STREAM_WALK, 2 * walk.number + 1))
        levels = 1 - (torch.arange(walk.length - 1) + shift) / (walk.length - 1)
        inner = self.distribution.timesteps(levels.clamp(0, 1))
        return torch.cat([torch.tensor([len(self.distribution) - 1]), inner, torch.tensor([-1])])

    def _ddim(self, latents: Tensor, prediction: Tensor, timesteps: Tensor, following: Tensor) -> Tensor:
        """The deterministic step of DDIM between any two timesteps; -1 is the end, without noise."""
        now = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        then = torch.where(following < 0, 1.0, self.alphas_cumprod[following.clamp_min(0)]).view(-1, 1, 1, 1)
        if self.prediction_type == "v_prediction":
            clean = now.sqrt() * latents - (1 - now).sqrt() * prediction
            noise = now.sqrt() * prediction + (1 - now).sqrt() * latents
        elif self.prediction_type == "sample":
            clean, noise = prediction, (latents - now.sqrt() * prediction) / (1 - now).sqrt()
        else:
            clean, noise = (latents - (1 - now).sqrt() * prediction) / now.sqrt(), prediction
        return then.sqrt() * clean + (1 - then).sqrt() * noise


@dataclass(frozen=True)
class _Walk:
    """One walk: its number in the run, the step it is at, and its steps."""

    number: int
    place: int
    length: int
