"""Recording of the full-precision model while it samples: calls to learn from, and images to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..calibration.calls import Call
from ..evaluation import Sampling, generate_images
from ..utils.errors import DamagedFileError
from ..utils.files import replacing_file
from ..utils.torch_files import is_finite_tensor, read_torch


@dataclass(frozen=True)
class Reference:
    """Images and calls of the full-precision model.

    Attributes:
        images: generated images, uint8 [images, height, width, 3].
        calls: some of the denoiser's calls.
    """

    images: np.ndarray
    calls: list[Call]

    @classmethod
    def empty(cls) -> Reference:
        """Return a reference without images and calls."""
        return cls(np.empty((0, 0, 0, 3), np.uint8), [])

    def save(self, path: Path) -> None:
        """Write the reference to a file, which is complete or does not exist at any time."""
        calls = [(call.args, call.kwargs, call.output) for call in self.calls]
        with replacing_file(path) as partial:
            torch.save({"images": torch.from_numpy(self.images), "calls": calls}, partial)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Reference:
        """Read a reference that `save` has written, with the calls on `device`.

        Raises:
            DamagedFileError: the file is damaged, or holds values that are not finite.
        """
        remedy = "Delete it: the images are then generated again."
        content = read_torch(path, remedy)
        if not (
            isinstance(content, dict)
            and content.keys() == {"images", "calls"}
            and is_finite_tensor(content["images"], torch.uint8)
            and content["images"].dim() == 4
            and isinstance(content["calls"], list)
            and all(_is_call(call) for call in content["calls"])
        ):
            raise DamagedFileError(path, "is damaged: it does not hold images and finite calls", remedy)
        return cls(content["images"].numpy(), [Call(*call).to(device) for call in content["calls"]])


def _is_call(call: Any) -> bool:
    """Return whether `call` has the arguments and the finite output of a saved call."""
    return (
        isinstance(call, tuple)
        and len(call) == 3
        and isinstance(call[0], tuple)
        and isinstance(call[1], dict)
        and all(isinstance(name, str) for name in call[1])
        and is_finite_tensor(call[2])
    )


class _Recorder:
    """Forward hook that keeps `count` calls, each with the same probability, without holding all (reservoir sampling).

    Args:
        count: number of calls to keep.
        seed: seed of the choice.

    Attributes:
        calls: kept calls, on the CPU.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.calls: list[Call] = []
        self._count, self._seen = count, 0
        self._rng = np.random.default_rng(seed)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        place = self._seen if self._seen < self._count else int(self._rng.integers(self._seen + 1))
        self._seen += 1
        if place < self._count:
            call = Call(args, kwargs, output[0]).to(torch.device("cpu"))
            self.calls[place : place + 1] = [call]


def record(
    pipeline: DiffusionPipeline,
    model: nn.Module,
    captions: Sequence[str],
    sampling: Sampling,
    calls: int,
    progress: bool = True,
) -> Reference:
    """Generate an image for each caption, and keep some of the denoiser's calls.

    Args:
        pipeline: pipeline in full precision.
        model: denoiser of the pipeline.
        captions: prompts.
        sampling: settings of sampling; its seed also chooses the calls.
        calls: number of calls to keep, at random over all images and steps; fewer where sampling makes fewer.
        progress: whether to show a progress bar.
    """
    recorder = _Recorder(calls, sampling.seed)
    hook = model.register_forward_hook(recorder, with_kwargs=True)
    try:
        images = generate_images(pipeline, captions, sampling, progress=progress)
    finally:
        hook.remove()
    return Reference(images, recorder.calls)
