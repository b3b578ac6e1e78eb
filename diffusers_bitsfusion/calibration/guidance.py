"""Targets of tuning that preserve classifier-free guidance.

A prediction of minimal error shrinks what it cannot predict, and the difference that the text makes is part of that.
The pipeline multiplies this difference by the guidance scale, and so multiplies its loss.
"""

from __future__ import annotations

from torch import Tensor

from .calls import Call, square_errors

# Share of the lost guidance by which targets are corrected after a step. It must be slower than tuning itself and
# faster than its schedule.
_RATE = 0.05


class Guidance:
    """Targets with as much additional guidance as a model's predictions lack.

    After each step the surplus grows by a twentieth of what the predictions lacked in it, or falls where they had too
    much. A row counts by the inverse of its error: at little noise the error is many times the difference that the
    text makes, and says nothing about it.

    Attributes:
        surplus: share of `Call.guidance` that targets have in addition to it.
    """

    def __init__(self) -> None:
        self.surplus = 0.0
        self._along = self._square = 0.0

    def target(self, call: Call) -> Tensor:
        """Return the target of a call's prediction, floating [rows, ...]."""
        return call.output if call.guidance is None else call.output + self.surplus * call.guidance

    def observe(self, predicted: Tensor, call: Call) -> None:
        """Measure how much guidance a prediction, floating [rows, ...], lacks."""
        if call.guidance is None:
            return
        predicted, added = predicted.detach(), call.guidance.flatten(1)
        weights = 1 / square_errors(predicted, call.output)
        self._along += float(weights @ ((predicted - call.output).flatten(1) * added).sum(dim=1))
        self._square += float(weights @ added.square().sum(dim=1))

    def step(self) -> None:
        """Correct the surplus by what has been observed since the last step."""
        if self._square > 0:
            self.surplus -= _RATE * self._along / self._square
        self._along = self._square = 0.0
