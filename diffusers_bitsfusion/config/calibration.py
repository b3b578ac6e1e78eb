"""`Calibration`: settings of a calibration run, and the memory that it may use."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..utils.errors import shown
from ..utils.json_files import is_list_of, is_number

_DEFAULT_PROMPTS = Path(__file__).with_name("prompts.txt")


def default_prompts() -> list[str]:
    """Return the shipped prompts, of everyday images of many kinds and styles, for models of any subject."""
    return _DEFAULT_PROMPTS.read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True)
class Calibration:
    """Settings of the pipeline's run that observes the inputs of its layers.

    Attributes:
        prompts: prompts to sample images for; None for the shipped list.
        num_samples: number of images, each with a prompt of its own as long as there are enough.
        num_inference_steps: number of steps of the pipeline's own scheduler, all of which count.
        guidance_scale: scale of classifier-free guidance; None for the pipeline's default.
        seed: seed of the choice of prompts, of the noise and of the sampled positions.
        batch_size: number of images that are sampled at once. It changes the result as little as another seed does.
        tuning_steps: number of steps that tune scales, biases and norms of the packed model (`tuning.py`) on the
            images of this run; each step computes gradients of four batches of them, with new noise. 0 for no tuning.
        memory_gb: upper bound, in GB (1e9 bytes), of the memory that calibration uses beside the pipeline, on the
            device of the model.
        cache_dir: folder that stores what is done, so that an interrupted run continues from there; under
            `accelerate launch` on a disk that all processes share. None stores nothing.

    Raises:
        ValueError: a value is impossible; the message names the attribute.
    """

    prompts: Sequence[str] | None = None
    num_samples: int = 16
    num_inference_steps: int = 20
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 4
    tuning_steps: int = 0
    memory_gb: float = 8.0
    cache_dir: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.prompts is not None:
            prompts = self.prompts
            if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not is_list_of(list(prompts), str):
                raise ValueError(f"calibration prompts must be a list of texts, got {shown(prompts)}")
            if not prompts:
                raise ValueError("calibration prompts are an empty list; leave them out for the shipped ones.")
        for name, minimum in (
            ("num_samples", 1),
            ("num_inference_steps", 1),
            ("seed", 0),
            ("batch_size", 1),
            ("tuning_steps", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ValueError(f"{name} of the calibration must be an integer from {minimum}, got {shown(value)}")
        if not (is_number(self.memory_gb) and self.memory_gb > 0):
            raise ValueError(f"memory_gb of the calibration must be positive, got {shown(self.memory_gb)}")
        if not (self.guidance_scale is None or is_number(self.guidance_scale)):
            raise ValueError(f"guidance_scale of the calibration must be a number, got {shown(self.guidance_scale)}")
        if not (self.cache_dir is None or isinstance(self.cache_dir, (str, os.PathLike))):
            raise ValueError(f"cache_dir of the calibration must be a path, got {shown(self.cache_dir)}")

    @classmethod
    def of(cls, value: Any) -> Calibration | None:
        """Return the settings that a user's `calibration=` means; None for no calibration.

        Args:
            value: None or False, True for the defaults, a mapping of values, or a `Calibration`.

        Raises:
            ValueError: the value is none of these, or a mapping with unknown keys.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"calibration must be None, True, a Calibration or a dict of its values, got {value!r}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(value) - known):
            raise ValueError(f"calibration has no {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON-safe dictionary, which `of` reads."""
        prompts = None if self.prompts is None else list(self.prompts)
        cache_dir = None if self.cache_dir is None else os.fspath(self.cache_dir)
        return asdict(self) | {"prompts": prompts, "cache_dir": cache_dir}

    def summary(self) -> dict[str, Any]:
        """Return the summary for a quantized checkpoint, JSON-safe and without prompts, which may be private."""
        prompts = "default" if self.prompts is None else f"{len(self.prompts)} of the user's"
        kept = ("num_samples", "num_inference_steps", "guidance_scale", "seed", "tuning_steps")
        return {"prompts": prompts} | {name: getattr(self, name) for name in kept}
