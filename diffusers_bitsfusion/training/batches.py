"""Batches of noisy latents, each sample a function of its position in the run alone.

Position p = step * global batch + place in the batch decides on the image, its crop, the noise, the timestep and
whether the text is dropped. So a run does not depend on the number of processes that share its batches, and continues
exactly from any step without the state of any generator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, SchedulerMixin
from torch import Tensor
from torch.utils.data import DataLoader

from ..utils.seeds import cpu_generator, derived_seed
from ..utils.timesteps import TimestepDistribution
from .images import TrainingImages
from .prompt_embeddings import TextEncoder

# Streams of random numbers, one for each use of a position, so that no two uses get the same numbers.
STREAM_IMAGE, STREAM_NOISE, STREAM_SAMPLING, STREAM_ORDER = range(4)


@dataclass
class Batch:
    """Inputs and target of one call of the model.

    Attributes:
        positions: position of each sample in the run.
        captions: caption of each sample, dropped ones included.
        noisy: noisy latents, fp32 [batch, channels, height, width].
        timesteps: int64 [batch].
        states: prompt embeddings, floating [batch, tokens, width], those of the empty text where it was dropped.
        target: target of the prediction, fp32 [batch, channels, height, width].
    """

    positions: list[int]
    captions: list[str]
    noisy: Tensor
    timesteps: Tensor
    states: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class Sharing:
    """Distribution of a step's batch over processes and forward passes.

    Attributes:
        batch_size: number of samples of one process in one forward pass.
        accumulation: number of forward passes a step.
        processes: number of processes.
        index: index of this process.
    """

    batch_size: int
    accumulation: int = 1
    processes: int = 1
    index: int = 0

    @property
    def total(self) -> int:
        """Number of samples a step."""
        return self.batch_size * self.accumulation * self.processes

    def places(self, micro: int) -> range:
        """Return the places within the step's batch of this process's samples in forward pass `micro`."""
        start = (micro * self.processes + self.index) * self.batch_size
        return range(start, start + self.batch_size)


def generator_of(seed: int, stream: int, position: int) -> torch.Generator:
    """Return the generator of one position, on the CPU so that its numbers are the same on every device."""
    return cpu_generator(derived_seed(seed, stream, position, bits=63))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence((seed, STREAM_ORDER, epoch))).permutation(count)


def sample_at(seed: int, position: int, count: int) -> int:
    """Return the index of a position's sample of `count`: each once an epoch, each epoch in another order."""
    epoch, place = divmod(position, count)
    return int(_order(seed, epoch, count)[place])


class Batches(ABC):
    """Batches of noisy latents of images.

    Args:
        text: text encoder for the captions.
        scheduler: scheduler with the noise schedule and the prediction type of the model.
        distribution: distribution of timesteps.
        sharing: distribution of batches over processes.
        text_dropout: probability that a caption is replaced by the empty text.
        seed: seed of all random numbers.
        device: device of the batches.

    Attributes:
        skipped: indices of images that could not be decoded.
        renewed_every: number of steps whose samples `start` prepares; None where it prepares those of all steps.
    """

    renewed_every: int | None = None

    def __init__(
        self,
        text: TextEncoder,
        scheduler: SchedulerMixin,
        distribution: TimestepDistribution,
        sharing: Sharing,
        *,
        text_dropout: float = 0.1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.text, self.scheduler, self.distribution, self.sharing = text, scheduler, distribution, sharing
        self.text_dropout, self.seed, self.device = text_dropout, seed, device
        self.skipped: set[int] = set()

    @abstractmethod
    def start(self, step: int) -> None:
        """Let `next` continue from the first forward pass of `step`."""

    def next(self) -> Batch:
        """Return the next batch of this process."""
        samples = self._samples()
        positions = [sample["position"] for sample in samples]
        captions = [sample["caption"] for sample in samples]
        generators = [generator_of(self.seed, STREAM_NOISE, position) for position in positions]
        chance = torch.stack([torch.rand(2, generator=generator) for generator in generators])
        clean = self._latents(samples, generators)
        noise = _normal_like(clean, generators)
        timesteps = self.distribution.timesteps(chance[:, 0]).to(self.device)
        return Batch(
            positions,
            captions,
            self.scheduler.add_noise(clean, noise, timesteps),
            timesteps,
            self.text.encode(captions, dropped=chance[:, 1] < self.text_dropout),
            self._target(clean, noise, timesteps),
        )

    @abstractmethod
    def _samples(self) -> list[dict[str, Any]]:
        """Return the samples of the next batch, each with its `position` and `caption`."""

    @abstractmethod
    def _latents(self, samples: list[dict[str, Any]], generators: list[torch.Generator]) -> Tensor:
        """Return the clean latents of samples, fp32 [batch, channels, height, width].

        Args:
            samples: samples of a batch.
            generators: generator of each sample, for all its random numbers.
        """

    def _target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(clean, noise, timesteps)
            return velocity
        return {"epsilon": noise, "sample": clean}[kind]


class ImageBatches(Batches):
    """Batches from captioned images, which the VAE encodes.

    Args:
        images: captioned images.
        vae: VAE that encodes them, in its own dtype.
        text: see `Batches`.
        scheduler: see `Batches`.
        distribution: see `Batches`.
        sharing: see `Batches`.
        num_workers: number of processes that read and decode images.
        **options: see `Batches`.
    """

    def __init__(
        self,
        images: TrainingImages,
        vae: AutoencoderKL,
        text: TextEncoder,
        scheduler: SchedulerMixin,
        distribution: TimestepDistribution,
        sharing: Sharing,
        *,
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(text, scheduler, distribution, sharing, **options)
        self.images, self.vae, self.num_workers = images, vae, num_workers
        self._loaded: Iterator[Any] = iter(())

    def start(self, step: int) -> None:
        """Let `next` continue from the first forward pass of `step`."""
        loader = DataLoader(
            _Positioned(self.images, self.seed),
            batch_sampler=_Positions(self.sharing, step),
            num_workers=self.num_workers,
            collate_fn=list,
            generator=torch.Generator(),  # Torch's own would be advanced once more by a run that is continued.
        )
        self._loaded = iter(loader)

    def _samples(self) -> list[dict[str, Any]]:
        samples: list[dict[str, Any]] = next(self._loaded)
        self.skipped.update(index for sample in samples for index in sample["skipped"])
        return samples

    @torch.no_grad()
    def _latents(self, samples: list[dict[str, Any]], generators: list[torch.Generator]) -> Tensor:
        pixels = torch.stack([sample["pixels"] for sample in samples])
        distribution = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        latents: Tensor = distribution.mean + distribution.std * _normal_like(distribution.mean, generators)
        return latents.float() * float(self.vae.config.scaling_factor)


def _normal_like(tensor: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Return unit normal numbers like `tensor` [batch, ...], each sample's from its own generator."""
    rows = [torch.randn(tensor.shape[1:], generator=generator) for generator in generators]
    return torch.stack(rows).to(tensor.device, tensor.dtype)


class _Positions:
    """Batch sampler of the positions of this process's batches from `step` on, without end."""

    def __init__(self, sharing: Sharing, step: int) -> None:
        self.sharing, self.step = sharing, step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.step
        while True:
            for micro in range(self.sharing.accumulation):
                yield [step * self.sharing.total + place for place in self.sharing.places(micro)]
            step += 1


class _Positioned(torch.utils.data.Dataset[dict[str, Any]]):
    """Images by position in the run, which the loader's workers read."""

    def __init__(self, images: TrainingImages, seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = sample_at(self.seed, position, len(self.images))
        sample = self.images.load(index, generator_of(self.seed, STREAM_IMAGE, position))
        return {"position": position} | sample
