"""Calls of a model by its pipeline, kept with what it answered, to be repeated by a quantized one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import convert_to_fp32, send_to_device
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn

# Errors below are none: the logarithm of a prediction without any error must have no slope, its inverse an end.
_LEAST_ERROR = 1e-12


@dataclass(frozen=True)
class Call:
    """One call of the denoiser, as during sampling; of both halves, with and without the prompt, where it is guided.

    Attributes:
        args, kwargs: its arguments, as the pipeline gave them.
        output: the predicted noise (or velocity), floating [rows, ...].
        guidance: what the text adds to `output`, floating [rows, ...], 0 in rows without; None where unknown.
        shared: further arguments by name, which other calls have as well: for as many rows, of which `rows` are taken.
        rows: int64 [rows]; None without `shared`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    guidance: Tensor | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)
    rows: Tensor | None = None

    def repeat(self, model: nn.Module) -> Tensor:
        """The prediction of `model` for the same arguments."""
        return model(*self.args, **self.kwargs, **self._taken())[0]

    def to(self, device: torch.device) -> Call:
        """The call on a device, with arguments of its own."""
        kwargs = {**self.kwargs, **self._taken()}
        return Call(*send_to_device((self.args, kwargs, self.output, self.guidance), device))

    def float(self) -> Call:
        """The call with half precision as fp32."""
        return Call(*convert_to_fp32(self.parts))

    @property
    def parts(self) -> tuple[Any, ...]:
        """What `Call` is made of, in order."""
        return self.args, self.kwargs, self.output, self.guidance, self.shared, self.rows

    def _taken(self) -> Mapping[str, Any]:
        """Of `shared`, the rows of this call."""
        return recursively_apply(
            lambda tensor: tensor[self.rows],
            self.shared,
            test_type=lambda value: isinstance(value, Tensor) and value.shape[:1] == self.output.shape[:1],
        )


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Call]]:
    """Every call of `model` within the block, on the CPU."""
    calls: list[Call] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(Call(args, kwargs, output[0]).to(torch.device("cpu")))

    hook = model.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def square_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean square error of each row, floating [rows]; never 0."""
    return (predicted - target).square().flatten(1).mean(dim=1).clamp_min(_LEAST_ERROR)
