"""The model, the reference and the settings that every method of measuring sensitivity uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..config.bitsfusion import BitsFusionConfig
from ..evaluation import DENOISERS, Clip, Sampling
from ..packing.planning import fixed_bits, make_plan, recipe_layers
from ..utils.errors import shown
from ..utils.json_files import is_count, is_number
from ..utils.private_names import DIFFUSERS_FP32
from .header import Item
from .recording import Reference

Record = tuple[Item, dict[str, float | None]]


@dataclass(frozen=True)
class Settings:
    """Settings of measuring sensitivity.

    Attributes:
        qat_steps: number of training steps of each layer, for the full analysis.
        learning_rate: learning rate of that training, as a fraction of the root mean square of the layer's weights.
        calls: number of the denoiser's calls that the estimates use.
        sampling: settings of sampling.
        lpips: whether to measure LPIPS.

    Raises:
        ValueError: a value is of another type or out of range; the message names it.
    """

    qat_steps: int = 10
    learning_rate: float = 4e-3
    calls: int = 8
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=20))
    lpips: bool = False

    def __post_init__(self) -> None:
        for name, minimum in (("qat_steps", 0), ("calls", 1)):
            if not is_count(getattr(self, name), minimum):
                raise ValueError(f"{name} is {shown(getattr(self, name))}, but must be an integer from {minimum}.")
        if not (is_number(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"learning_rate is {shown(self.learning_rate)}, but must be at least 0.")
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling is {shown(self.sampling)}, but must be a Sampling.")
        if not isinstance(self.lpips, bool):
            raise ValueError(f"lpips is {shown(self.lpips)}, but must be True or False.")


@dataclass
class Study:
    """One model under analysis.

    Attributes:
        pipeline: pipeline in full precision, fp32, whose parameters do not require gradients.
        captions: prompts of the images.
        settings: settings of the measurement.
        clip: CLIP that scores the images; None without one.
        reference: images and calls of the full-precision model, the calls on its device.
    """

    pipeline: DiffusionPipeline
    captions: Sequence[str]
    settings: Settings
    clip: Clip | None
    reference: Reference

    @cached_property
    def model(self) -> ModelMixin:
        """The denoiser."""
        return denoiser(self.pipeline)

    @cached_property
    def layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """The layers whose bits a recipe decides, by name."""
        return analysed_layers(self.model)


def denoiser(pipeline: DiffusionPipeline) -> ModelMixin:
    """Return the UNet or transformer of a pipeline."""
    return next(model for name in DENOISERS if (model := getattr(pipeline, name, None)) is not None)


def analysed_layers(model: ModelMixin) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers whose bits a recipe decides, by name."""
    return recipe_layers(model, DIFFUSERS_FP32.read(model) or [])


def undecided_bits(model: ModelMixin, time_embedding: str = "auto") -> tuple[float, int]:
    """Return the part of the paper's average bits that no recipe decides: first and last layer, time embedding.

    Args:
        model: model in full precision, whose parameters may be on the meta device.
        time_embedding: `time_embedding` of the config to quantize by, see `BitsFusionConfig`.

    Returns:
        (bits, number of weights that the average is over).
    """
    exclude = DIFFUSERS_FP32.read(model) or []
    plan = make_plan(model, BitsFusionConfig(recipe=1, time_embedding=time_embedding), exclude)
    decided = analysed_layers(model)
    special = {name: bits for name, bits in plan.bits.items() if name not in decided}
    return fixed_bits(model, plan, special, exclude)
