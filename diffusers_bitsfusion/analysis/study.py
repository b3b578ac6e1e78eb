"""What every way of measuring sensitivity works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..config.bitsfusion import BitsFusionConfig
from ..evaluation import DENOISERS, Clip, Sampling
from ..packing.plan import fixed_bits, make_plan, recipe_layers
from ..utils.private_names import DIFFUSERS_FP32
from .recording import Reference
from .results import Item

Record = tuple[Item, dict[str, float | None]]


@dataclass(frozen=True)
class Settings:
    """How sensitivity is measured.

    Attributes:
        qat_steps: training steps of each layer, for the full analysis.
        learning_rate: of that training, as a fraction of the root mean square of the layer's weights.
        calls: calls of the denoiser that the estimates look at.
        sampling: how pictures are drawn.
        lpips: whether to measure LPIPS.

    Raises:
        ValueError: a number is out of range.
    """

    qat_steps: int = 10
    learning_rate: float = 4e-3
    calls: int = 8
    sampling: Sampling = Sampling(steps=20)
    lpips: bool = False

    def __post_init__(self) -> None:
        for name, least in (("qat_steps", 0), ("learning_rate", 0), ("calls", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {least}.")


@dataclass
class Study:
    """One model under analysis.

    Attributes:
        pipeline: in full precision, fp32, taking no gradients.
        captions: what is drawn.
        settings: how.
        clip: scores the pictures, where there is one.
        reference: pictures and calls of the full-precision model, the calls on its device.
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
    """The UNet or transformer of a pipeline."""
    return next(model for name in DENOISERS if (model := getattr(pipeline, name, None)) is not None)


def analysed_layers(model: ModelMixin) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers whose bits a recipe decides, by name."""
    return recipe_layers(model, DIFFUSERS_FP32.read(model) or [])


def undecided_bits(model: ModelMixin, time_embedding: str = "auto") -> tuple[float, int]:
    """Return what no recipe decides of the paper's average bits: first and last layer, time embedding.

    Args:
        model: in full precision; its parameters may be on the meta device.
        time_embedding: what quantizing will be told, see `BitsFusionConfig`.

    Returns:
        (bits, all weights that the average is over).
    """
    exclude = DIFFUSERS_FP32.read(model) or []
    plan = make_plan(model, BitsFusionConfig(recipe=1, time_embedding=time_embedding), exclude)
    decided = analysed_layers(model)
    special = {name: bits for name, bits in plan.bits.items() if name not in decided}
    return fixed_bits(model, plan, special, exclude)
