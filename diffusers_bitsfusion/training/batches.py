"""Batches of noisy latents, each sample drawn from its position in the run alone.

Position p = step * global batch + place in it decides on the image, its crop, the noise, the timestep and whether the
text is dropped. So a run is the same whatever the number of processes that share its batches, and continues exactly
from any step without any generator's state.
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

# Streams of random numbers that must not meet: every use of a position has its own.
STREAM_IMAGE, STREAM_NOISE, STREAM_DRAWING, STREAM_ORDER = range(4)


@dataclass
class Batch:
    """What one call of the model gets.

    Attributes:
        positions: where in the run each sample is.
        captions: texts before any was dropped.
        noisy: fp32 [batch, channels, height, width] latents.
        timesteps: int64 [batch].
        states: [batch, tokens, width] text states, those of the empty text where it was dropped.
        target: as `noisy`, what the model should predict.
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
    """How a step's batch is shared out.

    Attributes:
        batch_size: samples of one process in one forward pass.
        accumulation: forward passes a step.
        processes: number of processes.
        index: this process's.
    """

    batch_size: int
    accumulation: int = 1
    processes: int = 1
    index: int = 0

    @property
    def total(self) -> int:
        """Samples a step."""
        return self.batch_size * self.accumulation * self.processes

    def places(self, micro: int) -> range:
        """Places within the step's batch of this process's samples in forward pass `micro`."""
        start = (micro * self.processes + self.index) * self.batch_size
        return range(start, start + self.batch_size)


def generator_of(seed: int, stream: int, position: int) -> torch.Generator:
    """The random numbers of one position, on the CPU so that they are the same on every device."""
    return cpu_generator(derived_seed(seed, stream, position, bits=63))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence((seed, STREAM_ORDER, epoch))).permutation(count)


def sample_at(seed: int, position: int, count: int) -> int:
    """Which of `count` samples a position takes: every one once an epoch, each epoch in another order."""
    epoch, place = divmod(position, count)
    return int(_order(seed, epoch, count)[place])


class Batches(ABC):
    """Latents of pictures with noise added.

    Args:
        text: encodes captions.
        scheduler: gives the noise schedule and what the model predicts.
        distribution: of timesteps.
        sharing: how batches are shared out.
        text_dropout: probability that a caption is replaced by the empty text.
        seed: of everything random.
        device: where batches go.

    Attributes:
        skipped: indices of images that did not decode.
        renewed_every: `start` prepares the samples of so many steps; None where it prepares those of all.
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
    ):
        self.text, self.scheduler, self.distribution, self.sharing = text, scheduler, distribution, sharing
        self.text_dropout, self.seed, self.device = text_dropout, seed, device
        self.skipped: set[int] = set()

    @abstractmethod
    def start(self, step: int) -> None:
        """Let `next` continue from the first forward pass of `step`."""

    def next(self) -> Batch:
        """The next batch of this process."""
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
        """Samples of the next batch, each with its `position` and `caption`."""

    @abstractmethod
    def _latents(self, samples: list[dict[str, Any]], generators: list[torch.Generator]) -> Tensor:
        """Their clean latents, fp32 [batch, channels, height, width]; what is random from each one's generator."""

    def _target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            return self.scheduler.get_velocity(clean, noise, timesteps)
        return {"epsilon": noise, "sample": clean}[kind]


class ImageBatches(Batches):
    """Batches from captioned images, encoded by the VAE.

    Args:
        images: the data.
        vae: encodes them; its dtype is used.
        text, scheduler, distribution, sharing: see `Batches`.
        num_workers: processes that read and decode images.
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
    ):
        super().__init__(text, scheduler, distribution, sharing, **options)
        self.images, self.vae, self.num_workers = images, vae, num_workers
        self._loaded: Iterator[Any] = iter(())

    def start(self, step: int) -> None:
        loader = DataLoader(
            _Positioned(self.images, self.seed),
            batch_sampler=_Positions(self.sharing, step),
            num_workers=self.num_workers,
            collate_fn=list,
        )
        self._loaded = iter(loader)

    def _samples(self) -> list[dict[str, Any]]:
        samples = next(self._loaded)
        self.skipped.update(index for sample in samples for index in sample["skipped"])
        return samples

    @torch.no_grad()
    def _latents(self, samples: list[dict[str, Any]], generators: list[torch.Generator]) -> Tensor:
        pixels = torch.stack([sample["pixels"] for sample in samples])
        distribution = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        latents = distribution.mean + distribution.std * _normal_like(distribution.mean, generators)
        return latents.float() * self.vae.config.scaling_factor


def _normal_like(tensor: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Unit normal numbers like `tensor` [batch, ...], each sample's from its own generator."""
    rows = [torch.randn(tensor.shape[1:], generator=generator) for generator in generators]
    return torch.stack(rows).to(tensor.device, tensor.dtype)


class _Positions:
    """Batch sampler: positions of this process's batches from `step` on, without end."""

    def __init__(self, sharing: Sharing, step: int):
        self.sharing, self.step = sharing, step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.step
        while True:
            for micro in range(self.sharing.accumulation):
                yield [step * self.sharing.total + place for place in self.sharing.places(micro)]
            step += 1


class _Positioned(torch.utils.data.Dataset):
    """The images by position in the run; runs in the loader's workers."""

    def __init__(self, images: TrainingImages, seed: int):
        self.images, self.seed = images, seed

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = sample_at(self.seed, position, len(self.images))
        sample = self.images.load(index, generator_of(self.seed, STREAM_IMAGE, position))
        return {"position": position} | sample
