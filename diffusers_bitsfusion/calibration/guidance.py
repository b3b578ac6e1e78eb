"""Keeping classifier-free guidance while tuning.

Predictions of least error shrink what they cannot predict, and what the text adds to a prediction is a part of that.
The pipeline multiplies this part by the guidance scale, so what is lost of it is lost several times over.
"""

from __future__ import annotations

from torch import Tensor

from .calls import Call, square_errors

# Of the lost share, by which targets are corrected after a step: slower than tuning itself, faster than its schedule.
_RATE = 0.05


class Guidance:
    """Targets with more of what the text adds, by as much as a model's predictions lack of it.

    After each step the share grows by a twentieth of what they lacked in it, or falls where they had too much. A row
    counts by the inverse of its error: with little noise the error is many times what the text adds, and says nothing
    about it.

    Attributes:
        surplus: share of the text's part that targets have beside it.
    """

    def __init__(self) -> None:
        self.surplus = 0.0
        self._along = self._square = 0.0

    def target(self, call: Call) -> Tensor:
        """What to predict in the call, floating [rows, ...]."""
        return call.output if call.guidance is None else call.output + self.surplus * call.guidance

    def note(self, predicted: Tensor, call: Call) -> None:
        """Look at a prediction [rows, ...]."""
        if call.guidance is None:
            return
        predicted, added = predicted.detach(), call.guidance.flatten(1)
        weights = 1 / square_errors(predicted, call.output)
        self._along += float(weights @ ((predicted - call.output).flatten(1) * added).sum(dim=1))
        self._square += float(weights @ added.square().sum(dim=1))

    def step(self) -> None:
        """Correct by what has been noted since the last step."""
        if self._square > 0:
            self.surplus -= _RATE * self._along / self._square
        self._along = self._square = 0.0
