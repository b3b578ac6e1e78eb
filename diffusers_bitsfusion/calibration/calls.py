"""Calls of a model by its pipeline, recorded with the prediction, to be repeated by a quantized model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import convert_to_fp32, send_to_device
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn

# Smallest mean square error that counts, in squared units of the prediction: below it the logarithm of the error must
# have no slope, and its inverse an upper bound.
_MIN_ERROR = 1e-12


@dataclass(frozen=True)
class Call:
    """One call of the denoiser during sampling; under classifier-free guidance the call of both halves.

    Attributes:
        args: positional arguments, as the pipeline passed them.
        kwargs: keyword arguments, as the pipeline passed them.
        output: predicted noise (or velocity), floating [rows, ...].
        guidance: difference that the text makes to `output`, floating [rows, ...], 0 in unconditional rows; None where
            it is unknown.
        shared: further keyword arguments by name, which several calls share; this call uses their rows `rows`.
        rows: int64 [rows], indices into the rows of `shared`; None without `shared`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    guidance: Tensor | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)
    rows: Tensor | None = None

    def repeat(self, model: nn.Module) -> Tensor:
        """Return the prediction of `model` for the same arguments, floating [rows, ...]."""
        prediction: Tensor = model(*self.args, **self.kwargs, **self._shared_rows())[0]
        return prediction

    def to(self, device: torch.device) -> Call:
        """Return the call on a device, without shared arguments."""
        kwargs = {**self.kwargs, **self._shared_rows()}
        return Call(*send_to_device((self.args, kwargs, self.output, self.guidance), device))

    def float(self) -> Call:
        """Return the call with its half-precision tensors in fp32."""
        return Call(*convert_to_fp32(self.parts))

    @property
    def parts(self) -> tuple[Any, ...]:
        """Values of all attributes, in the order of `Call`'s arguments."""
        return self.args, self.kwargs, self.output, self.guidance, self.shared, self.rows

    def _shared_rows(self) -> Mapping[str, Any]:
        """Return the rows of `shared` that this call uses."""
        rows: Mapping[str, Any] = recursively_apply(
            lambda tensor: tensor[self.rows],
            self.shared,
            test_type=lambda value: isinstance(value, Tensor) and value.shape[:1] == self.output.shape[:1],
        )
        return rows


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Call]]:
    """Record every call of `model` within the block, on the CPU."""
    calls: list[Call] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(Call(args, kwargs, output[0]).to(torch.device("cpu")))

    hook = model.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def square_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean square error of each row, floating [rows], at least `_MIN_ERROR`."""
    return (predicted - target).square().flatten(1).mean(dim=1).clamp_min(_MIN_ERROR)
