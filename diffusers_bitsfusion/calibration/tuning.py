"""Tuning of what stays in floating point, so that a packed model predicts what it did in full precision.

Codes stay as they are. Every packed layer and every norm gets a gain and an offset for each of its channels,
y' = gain · y + offset; both are trained on recorded calls of the full-precision model and then folded into scales,
biases and norms, exactly. Layers that were rounded one by one learn to work together, in the memory of the packed
model: no latent weights, and a backward pass without gradients of weights. Not from the BitsFusion paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from tqdm.auto import tqdm

from ..nn.packed import PackedWeight, float_bits
from .calls import Call, square_errors
from .guidance import Guidance

# Of Adam: relative to a channel's own scale for gains, to the spread of a layer's output for offsets.
LEARNING_RATE = 0.01
_BETAS = (0.9, 0.99)
_WARM_UP = 20

# Of a step: what suits one picture and timestep harms another.
CALLS = 4

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class Channels:
    """Gain and offset of a module's output channels, in effect while tuning.

    Args:
        module: a packed layer or a norm with weights.

    Attributes:
        gain: fp32 [channels], a parameter.
        offset: fp32 [channels], a parameter, in units of `spread`; None for a module without a bias.
        spread: standard deviation of the output in the first call.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        weight = cast(Tensor, module.scale if isinstance(module, PackedWeight) else module.weight)
        self.gain = nn.Parameter(torch.ones(weight.shape[0], dtype=torch.float32, device=weight.device))
        self.offset = None if getattr(module, "bias", None) is None else nn.Parameter(torch.zeros_like(self.gain))
        self.spread: float | None = None
        self._axis = 1 if isinstance(module, (nn.Conv2d, nn.GroupNorm)) else -1

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.gain] if self.offset is None else [self.gain, self.offset]

    def __call__(self, module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        """A forward hook."""
        if self.spread is None:
            self.spread = float(y.detach().float().std(correction=0))
        shape = [1] * y.dim()
        shape[self._axis] = -1
        shift = torch.zeros_like(self.gain) if self.offset is None else self.offset * self.spread
        return _Scaled.apply(y, self.gain.view(shape), shift.view(shape))

    @torch.no_grad()
    def fold(self) -> None:
        """Make the module itself compute what it does with gain and offset."""
        module: Any = self.module
        if isinstance(module, PackedWeight):
            module.scale = float_bits(module.scale_bits.view(torch.float32) * self.gain)
        else:
            module.weight.mul_(self.gain)
        if self.offset is not None:
            assert self.spread is not None
            module.bias.mul_(self.gain).add_(self.offset, alpha=self.spread)


class _Scaled(torch.autograd.Function):
    """gain · y + offset in fp32, given and kept in the dtype of y."""

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

    Steps that see much noise make small errors, which decide what is drawn; by logarithms each call counts by what its
    error changes in proportion. What predictions lack of guidance is added to their targets (`guidance.py`). A step
    takes four calls; calls come in random order, all before any comes again. The rate rises for 20 steps and falls to
    zero as a cosine.

    Args:
        model: packed, on the device to use; half precision computes in bf16, and comes back in its own dtype.
        calls: of the full-precision model.
        steps: of Adam.
        seed: of the order.
        memory: bytes that activations may take. Where those of a call take more, the model checkpoints its gradients.
        state: of an interrupted run, to go on from.
        save: called with the state after each step.
        progress: whether to show a progress bar.

    Raises:
        ValueError: a loss is NaN or infinite, or the model would have to checkpoint its gradients and cannot.
    """
    device = next(model.parameters()).device
    dtypes = _to_fp32(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    half = torch.bfloat16 if {torch.float16, torch.bfloat16} & set(dtypes.values()) else None
    channels = _channels(model)
    guidance = Guidance()
    order = _order(len(calls), steps * CALLS, seed)

    def predict(index: int) -> tuple[Tensor, Call]:
        call = calls[order[index]].to(device).float()
        with torch.autocast(device.type, half, enabled=half is not None):
            return call.repeat(model).float(), call

    def log_error(predicted: Tensor, call: Call) -> Tensor:
        return square_errors(predicted, guidance.target(call)).log().mean()

    with _hooked(channels), _bounded(model, memory, lambda: log_error(*predict(0))), torch.enable_grad():
        parameters = [parameter for channel in channels for parameter in channel.parameters]
        optimizer = torch.optim.Adam(parameters, betas=_BETAS)
        start = _load(state, channels, optimizer, guidance)
        bar = tqdm(total=steps, initial=start, desc="Tuning scales, biases and norms", disable=not progress)
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * _schedule(step, steps)
            optimizer.zero_grad()
            total = 0.0
            for index in range(step * CALLS, (step + 1) * CALLS):
                predicted, call = predict(index)
                loss = log_error(predicted, call) / CALLS
                loss.backward()
                guidance.note(predicted, call)
                total += float(loss.detach())
            if not math.isfinite(total):
                raise ValueError(f"The loss is {total} in step {step + 1} of tuning. Calibrate in torch.float32.")
            optimizer.step()
            guidance.step()
            bar.set_postfix(mse=f"{math.exp(total):.3g}", refresh=False)
            bar.update()
            if save is not None:
                save(_state(step + 1, channels, optimizer, guidance))
        bar.close()
    for channel in channels:
        channel.fold()
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)
    for parameter in trainable:
        parameter.requires_grad_(True)


def _channels(model: nn.Module) -> list[Channels]:
    """Of the layers that compute with scales or weights per output channel."""
    found = []
    for module in model.modules():
        if isinstance(module, PackedWeight):
            found.append(Channels(module))
        elif isinstance(module, _NORMS) and module.weight is not None and module.weight.dim() == 1:
            found.append(Channels(module))
    return found


def _order(count: int, length: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(count) for _ in range(-(-length // count))])


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _to_fp32(model: nn.Module) -> dict[nn.Parameter, torch.dtype]:
    """Make all floating parameters fp32, which steps of Adam need; the dtypes they had."""
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


@contextmanager
def _bounded(model: Any, memory: float, forward: Callable[[], Tensor]) -> Iterator[None]:
    """Gradient checkpointing where the activations of `forward` take more than `memory` bytes without it."""
    need = _saved_bytes(model, forward)
    if need <= memory:
        yield
        return
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise ValueError(
            f"Tuning needs {need / 1e9:.2g} GB for the activations of one call, more than memory_gb leaves, and "
            f"{type(model).__name__} has no gradient checkpointing. Lower batch_size or raise memory_gb."
        )
    before = model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if not before:
            model.disable_gradient_checkpointing()


def _saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that a backward pass would need of a forward pass, parameters aside; without keeping them."""
    total = 0
    seen: dict[int, StorageWeakRef] = {parameter.data_ptr(): _storage(parameter) for parameter in model.parameters()}

    def note(tensor: Tensor) -> Any:
        nonlocal total
        # Several operations keep the same tensor; another one may lie where a tensor was that is gone.
        place = tensor.untyped_storage().data_ptr()
        if place not in seen or seen[place].expired():
            seen[place] = _storage(tensor)
            total += tensor.untyped_storage().nbytes()

    with torch.enable_grad(), saved_tensors_hooks(note, lambda nothing: nothing):
        forward()
    return total


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


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
    """Go on from `state`; the number of steps done."""
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
    return state["step"]
