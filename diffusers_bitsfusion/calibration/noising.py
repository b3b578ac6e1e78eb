"""Pictures noised anew: calls of the model as many as wanted from few pictures, at the timesteps that matter."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.timesteps import TimestepDistribution
from .calls import Call

# Share of rows without text, as in the paper's Stage I. Of a pipeline's own calls under guidance it is a half, but the
# guidance scale multiplies the prediction with text.
_DROPPED = 0.1


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler whose noise `Noising` does not know.

    Raises:
        ValueError: it has no `alphas_cumprod`.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"Tuning noises pictures anew, and {type(scheduler).__name__} has no alphas_cumprod to do it by. Leave "
            "tuning_steps 0."
        )


class Noising:
    """Calls at random timesteps of pictures that a model has drawn.

    Args:
        scheduler: of the pipeline, with `alphas_cumprod`. What a model gets from other samplers of such a noise
            schedule is the same: sqrt(alpha_bar) * latents + sqrt(1 - alpha_bar) * noise.
        seed: of timesteps and noise.
        timesteps: those that the quantized model will know; None for all.
    """

    def __init__(self, scheduler: Any, seed: int, timesteps: Sequence[float] | None = None):
        self._alphas_cumprod: Tensor = scheduler.alphas_cumprod.float().cpu()
        # As in the paper's Stage I (section 6): with much noise it is decided what will be drawn.
        self._distribution = TimestepDistribution.beta(len(self._alphas_cumprod))
        known = range(len(self._alphas_cumprod)) if timesteps is None else sorted(timesteps)
        self._known = torch.tensor(known, dtype=torch.float32)
        self._generator = torch.Generator().manual_seed(seed)

    def repeat(self, call: Call, latents: Tensor, model: nn.Module) -> Call:
        """The call with each of its rows at another timestep, and what the model predicts there; on the CPU.

        A guided call has every picture twice, first without its text; here a tenth of all rows is without. The others
        are predicted without text as well, to tell what it adds.

        Args:
            call: with rows for each picture, once or, under guidance, several times over.
            latents: [pictures, ...], what was drawn in the end.
            model: in full precision.

        Raises:
            ValueError: the model does not take the latents alone (inpainting, for example).
        """
        rows, pictures = len(call.output), len(latents)
        sample, timesteps = self._noise(latents.float().cpu().repeat(rows // pictures, *[1] * (latents.dim() - 1)))
        if rows != 2 * pictures:
            noised = _at(call, model, sample, timesteps, torch.arange(rows))
            return replace(noised, output=_predict(model, noised))
        without = torch.arange(rows) % pictures
        given = torch.rand(rows, generator=self._generator) >= _DROPPED
        noised = _at(call, model, sample, timesteps, without + given * pictures)
        output = _predict(model, noised)
        unguided = _predict(model, replace(noised, rows=without))
        return replace(noised, output=output, guidance=output - unguided)

    def _noise(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [rows, ...] noised, and the timesteps fp32 [rows]."""
        timesteps = self._draw(len(clean))
        alpha_bar = self._alphas_cumprod[timesteps.round().long()].view(-1, *[1] * (clean.dim() - 1))
        noise = torch.randn(clean.shape, generator=self._generator)
        return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise, timesteps

    def _draw(self, count: int) -> Tensor:
        """fp32 [count], each the known timestep next to one of Beta(3, 1) scaled to all."""
        drawn = self._distribution.timesteps(torch.rand(count, generator=self._generator))
        return self._known[(drawn.unsqueeze(1) - self._known).abs().argmin(dim=1)]


def _at(call: Call, model: nn.Module, sample: Tensor, timesteps: Tensor, rows: Tensor) -> Call:
    """The call for another sample at other timesteps, with the other arguments of the given rows, int64."""
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments
    name = next(iter(bound))
    given, timestep = bound.pop(name), bound.pop("timestep")
    if given.shape[1:] != sample.shape[1:]:
        raise ValueError(
            f"Tuning noises a picture's latents {list(sample.shape[1:])}, but {type(model).__name__} takes "
            f"{list(given.shape[1:])}. Leave tuning_steps 0."
        )
    new = {name: sample.to(given.dtype), "timestep": timesteps if timestep.is_floating_point() else timesteps.long()}
    return Call((), new, call.output, shared=bound, rows=rows)


def _predict(model: nn.Module, call: Call) -> Tensor:
    """On the CPU."""
    return call.to(next(model.parameters()).device).repeat(model).cpu()
