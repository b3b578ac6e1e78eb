"""Tuning of the floating-point parameters of a packed model towards the full-precision model's predictions.

Codes stay as they are. Every packed layer and every norm gets a gain and an offset for each of its channels,
y' = gain · y + offset; both are trained on recorded calls of the full-precision model and then folded into scales,
biases and norms, exactly. So layers that were rounded one by one learn to compensate each other's errors, in the
memory of the packed model: without latent weights or gradients of weights. The BitsFusion paper does not have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..nn.packed import PackedWeight
from ..ops.kernels import has_bf16
from .activation_memory import bounded_activations
from .calls import Call, square_errors
from .guidance import Guidance

# Learning rate of Adam, relative to a channel's own scale for gains, to the spread of a layer's output for offsets.
LEARNING_RATE = 0.01
# Decay rates of Adam's first and second moments.
_BETAS = (0.9, 0.99)
# Number of steps over which the learning rate rises.
_WARM_UP = 20

# Number of calls a step: gradients of a single image and timestep would harm others.
CALLS = 4

# Classes of norms with a weight per channel.
_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class Channels:
    """Gain and offset of a module's output channels, a forward hook while tuning.

    Args:
        module: packed layer, or norm with weights.

    Attributes:
        gain: parameter, fp32 [channels].
        offset: parameter, fp32 [channels] in units of `spread`; None for a module without a bias.
        spread: standard deviation of the output in the first call; None before it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        weight = cast(Tensor, module.scale if isinstance(module, PackedWeight) else module.weight)
        self.gain = nn.Parameter(torch.ones(weight.shape[0], dtype=torch.float32, device=weight.device))
        self.offset = None if getattr(module, "bias", None) is None else nn.Parameter(torch.zeros_like(self.gain))
        self.spread: float | None = None
        self._axis = 1 if isinstance(module, (nn.Conv2d, nn.GroupNorm)) else -1

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters to train."""
        return [self.gain] if self.offset is None else [self.gain, self.offset]

    def __call__(self, module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        """Return the module's output `y` with gain and offset applied, as a forward hook does."""
        if self.spread is None:
            self.spread = float(y.detach().float().std(correction=0))
        shape = [1] * y.dim()
        shape[self._axis] = -1
        shift = torch.zeros_like(self.gain) if self.offset is None else self.offset * self.spread
        scaled: Tensor = _Scaled.apply(y, self.gain.view(shape), shift.view(shape))  # type: ignore[no-untyped-call]
        return scaled

    @torch.no_grad()
    def fold(self) -> None:
        """Fold gain and offset into the module's own scale or weight and its bias."""
        module: Any = self.module
        if isinstance(module, PackedWeight):
            module.set_rows(module.scale_bits.view(torch.float32) * self.gain, None)
        else:
            module.weight.mul_(self.gain)
        if self.offset is not None:
            assert self.spread is not None
            module.bias.mul_(self.gain).add_(self.offset, alpha=self.spread)


class _Scaled(torch.autograd.Function):
    """gain · y + offset, computed in fp32, with input, output and saved tensors in the dtype of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
        ctx.save_for_backward(y, gain)
        return (y.float() * gain + offset).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad,) = grads
        y, gain = ctx.saved_tensors
        exact = grad.float()
        return (exact * gain).to(y.dtype), (exact * y).sum_to_size(gain.shape), exact.sum_to_size(gain.shape)


def tune(
    model: nn.Module,
    calls: Sequence[Call],
    steps: int,
    *,
    seed: int = 0,
    memory: float = math.inf,
    state: Mapping[str, Any] | None = None,
    save: Callable[[Mapping[str, Any]], None] | None = None,
    progress: bool = True,
) -> None:
    """Tune a packed model in place: Adam on the logarithm of its predictions' mean square error.

    At high noise errors are small, but decide on the image's content; by logarithms each call counts by the relative
    change of its error. The guidance that predictions lack is added to their targets (`guidance.py`). A step has four
    calls; calls come in random order, and repeat only when all have been used. The learning rate rises for 20 steps
    and falls to zero as a cosine.

    Args:
        model: packed model, on the device to use. Where it has half-precision parameters it computes in bf16, on a
            processor that has it, and its parameters have their own dtype again in the end.
        calls: recorded calls of the full-precision model.
        steps: number of steps of Adam.
        seed: seed of the order of calls.
        memory: upper bound of the bytes of activations. Where a call needs more, gradient checkpointing is used.
        state: state of an interrupted run, to continue from.
        save: called with the state after each step.
        progress: whether to show a progress bar.

    Raises:
        ValueError: a loss is NaN or infinite, or the model needs gradient checkpointing and does not support it.
    """
    dtypes = _to_fp32(model)
    frozen = _freeze(model)
    halves = {torch.float16, torch.bfloat16} & set(dtypes.values())
    half = torch.bfloat16 if halves and has_bf16(next(model.parameters()).device) else None
    channels, guidance = _channels(model), Guidance()
    loss = _Loss(model, [calls[index] for index in _order(len(calls), steps * CALLS, seed)], guidance, half)
    with _hooked(channels), bounded_activations(model, memory, lambda: loss(0)), torch.enable_grad():
        parameters = [parameter for channel in channels for parameter in channel.parameters]
        optimizer = torch.optim.Adam(parameters, betas=_BETAS)
        start = _load(state, channels, optimizer, guidance)
        bar = tqdm(total=steps, initial=start, desc="Tuning scales, biases and norms", disable=not progress)
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * _schedule(step, steps)
            value = _train_step(loss, optimizer, step)
            guidance.step()
            bar.set_postfix(mse=f"{math.exp(value):.3g}", refresh=False)
            bar.update()
            if save is not None:
                save(_state(step + 1, channels, optimizer, guidance))
        bar.close()
    for channel in channels:
        channel.fold()
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)
    for parameter in frozen:
        parameter.requires_grad_(True)


@dataclass(frozen=True)
class _Loss:
    """Logarithm of the mean square error of a packed model's predictions on recorded calls.

    Attributes:
        model: packed model.
        calls: calls in the order of use, four a step.
        guidance: targets, which observe the predictions.
        half: dtype of autocast; None where the model computes in fp32.
    """

    model: nn.Module
    calls: Sequence[Call]
    guidance: Guidance
    half: torch.dtype | None

    def __call__(self, index: int) -> Tensor:
        """Return the loss of a call, a scalar."""
        return self._log_error(*self._predict(index))

    def backward(self, index: int) -> float:
        """Add the gradients of a call's share of a step's loss, and return this share."""
        predicted, call = self._predict(index)
        loss = self._log_error(predicted, call) / CALLS
        loss.backward()
        self.guidance.observe(predicted, call)
        return float(loss.detach())

    def _predict(self, index: int) -> tuple[Tensor, Call]:
        device = next(self.model.parameters()).device
        call = self.calls[index].to(device).float()
        with torch.autocast(device.type, self.half, enabled=self.half is not None):
            return call.repeat(self.model).float(), call

    def _log_error(self, predicted: Tensor, call: Call) -> Tensor:
        return square_errors(predicted, self.guidance.target(call)).log().mean()


def _train_step(loss: _Loss, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Make a step of the optimizer on the step's calls, and return its loss."""
    optimizer.zero_grad()
    value = sum(loss.backward(index) for index in range(step * CALLS, (step + 1) * CALLS))
    if not math.isfinite(value):
        raise ValueError(f"The loss is {value} in step {step + 1} of tuning. Calibrate in torch.float32.")
    optimizer.step()
    return value


def _freeze(model: nn.Module) -> list[nn.Parameter]:
    """Freeze all parameters, and return those that required gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    return parameters


def _channels(model: nn.Module) -> list[Channels]:
    """Return gains and offsets of all modules that have a scale or weight per output channel."""
    channels = []
    for module in model.modules():
        is_norm = isinstance(module, _NORMS) and module.weight is not None and module.weight.dim() == 1
        if is_norm or isinstance(module, PackedWeight):
            channels.append(Channels(module))
    return channels


def _order(count: int, length: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(count) for _ in range(-(-length // count))])


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _to_fp32(model: nn.Module) -> dict[nn.Parameter, torch.dtype]:
    """Cast all floating parameters to fp32, which steps of Adam need, and return the dtypes that they had."""
    dtypes = {p: p.dtype for p in model.parameters() if p.is_floating_point()}
    for parameter in dtypes:
        parameter.data = parameter.data.float()
    return dtypes


@contextmanager
def _hooked(channels: Sequence[Channels]) -> Iterator[None]:
    hooks = [channel.module.register_forward_hook(channel) for channel in channels]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _state(
    step: int, channels: Sequence[Channels], optimizer: torch.optim.Optimizer, guidance: Guidance
) -> dict[str, Any]:
    return {
        "step": step,
        "spreads": [channel.spread for channel in channels],
        "values": [parameter.detach() for channel in channels for parameter in channel.parameters],
        "optimizer": optimizer.state_dict(),
        "surplus": guidance.surplus,
    }


@torch.no_grad()
def _load(
    state: Mapping[str, Any] | None,
    channels: Sequence[Channels],
    optimizer: torch.optim.Optimizer,
    guidance: Guidance,
) -> int:
    """Continue from `state`, and return the number of steps done."""
    if state is None:
        return 0
    parameters = optimizer.param_groups[0]["params"]
    shapes = [tuple(value.shape) for value in state["values"]]
    if len(state["spreads"]) != len(channels) or shapes != [tuple(parameter.shape) for parameter in parameters]:
        raise ValueError("The kept state of tuning is of another model. Delete the calibration's folder.")
    for channel, spread in zip(channels, state["spreads"], strict=True):
        channel.spread = spread
    for parameter, value in zip(parameters, state["values"], strict=True):
        parameter.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    guidance.surplus = state["surplus"]
    steps: int = state["step"]
    return steps
