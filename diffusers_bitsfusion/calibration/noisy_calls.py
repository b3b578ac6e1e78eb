"""Calls of a model on noisy latents: any number of calls from few images, at the timesteps that matter."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.timesteps import TimestepDistribution
from .calls import Call

# Share of unconditional rows, as in the paper's Stage I (section 6). Half of the rows of a pipeline's own calls under
# guidance are unconditional, but the guidance scale multiplies the conditional prediction.
_UNCONDITIONAL_SHARE = 0.1


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler whose noise schedule `NoisyCalls` does not know.

    Raises:
        ValueError: the scheduler has no `alphas_cumprod`.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"Tuning adds noise to images, and {type(scheduler).__name__} has no alphas_cumprod to do it by. Leave "
            "tuning_steps 0."
        )


class NoisyCalls:
    """Calls of a model at random timesteps, on images that the model has generated.

    Args:
        scheduler: scheduler of the pipeline, with `alphas_cumprod`. The input of the model is the same for other
            samplers of such a noise schedule: sqrt(alpha_bar) * latents + sqrt(1 - alpha_bar) * noise.
        seed: seed of timesteps and noise.
        timesteps: timesteps that the quantized model will know; None for all.
    """

    def __init__(self, scheduler: Any, seed: int, timesteps: Sequence[float] | None = None) -> None:
        self._alphas_cumprod: Tensor = scheduler.alphas_cumprod.float().cpu()
        # As in the paper's Stage I (section 6), high noise is preferred, since it decides on the image's content.
        self._distribution = TimestepDistribution.beta(len(self._alphas_cumprod))
        known = range(len(self._alphas_cumprod)) if timesteps is None else sorted(timesteps)
        self._known = torch.tensor(known, dtype=torch.float32)
        self._generator = torch.Generator().manual_seed(seed)

    def repeat(self, call: Call, latents: Tensor, model: nn.Module) -> Call:
        """Return the call with each of its rows at another timestep and the model's prediction there, on the CPU.

        Under classifier-free guidance a call has every image twice, unconditional first; here a tenth of all rows is
        unconditional. The model predicts the other rows without text as well, which gives `Call.guidance`.

        Args:
            call: call with rows for each image, once or, under guidance, several times.
            latents: final latents of sampling, floating [images, ...].
            model: model in full precision.

        Raises:
            ValueError: the model does not accept the latents alone (inpainting, for example).
        """
        rows, images = len(call.output), len(latents)
        sample, timesteps = self._add_noise(latents.float().cpu().repeat(rows // images, *[1] * (latents.dim() - 1)))
        if rows != 2 * images:
            noisy = _at(call, model, sample, timesteps, torch.arange(rows))
            return replace(noisy, output=_predict(model, noisy))
        unconditional_rows = torch.arange(rows) % images
        is_conditional = torch.rand(rows, generator=self._generator) >= _UNCONDITIONAL_SHARE
        noisy = _at(call, model, sample, timesteps, unconditional_rows + is_conditional * images)
        output = _predict(model, noisy)
        unconditional = _predict(model, replace(noisy, rows=unconditional_rows))
        return replace(noisy, output=output, guidance=output - unconditional)

    def _add_noise(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Return noisy latents for clean ones, fp32 [rows, ...], and their timesteps, fp32 [rows]."""
        timesteps = self._sample_timesteps(len(clean))
        alpha_bar = self._alphas_cumprod[timesteps.round().long()].view(-1, *[1] * (clean.dim() - 1))
        noise = torch.randn(clean.shape, generator=self._generator)
        return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise, timesteps

    def _sample_timesteps(self, count: int) -> Tensor:
        """Return fp32 [count], the known timestep nearest to each sample of Beta(3, 1) scaled to all timesteps."""
        sampled = self._distribution.timesteps(torch.rand(count, generator=self._generator))
        return self._known[(sampled.unsqueeze(1) - self._known).abs().argmin(dim=1)]


def _at(call: Call, model: nn.Module, sample: Tensor, timesteps: Tensor, rows: Tensor) -> Call:
    """Return the call for another sample and other timesteps, with its other arguments of the rows `rows`, int64."""
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments
    name = next(iter(bound))
    given, timestep = bound.pop(name), bound.pop("timestep")
    if given.shape[1:] != sample.shape[1:]:
        raise ValueError(
            f"Tuning adds noise to an image's latents {list(sample.shape[1:])}, but {type(model).__name__} takes "
            f"{list(given.shape[1:])}. Leave tuning_steps 0."
        )
    new = {name: sample.to(given.dtype), "timestep": timesteps if timestep.is_floating_point() else timesteps.long()}
    return Call((), new, call.output, shared=bound, rows=rows)


def _predict(model: nn.Module, call: Call) -> Tensor:
    """Return the model's prediction for a call, on the CPU."""
    return call.to(next(model.parameters()).device).repeat(model).cpu()
