"""Rounding that compensates its own errors in a layer's output instead of its weights.

For inputs x with second moment H = E[x xᵀ], rounding a row w to s·k changes the output by (w − s·k)ᵀ H (w − s·k) in
the mean square. The columns are rounded one after another, and the columns still to be rounded compensate each error
as well as possible (OBQ, arXiv 2208.11580; GPTQ, arXiv 2210.17323). With the Cholesky factor H = Rᵀ R, R upper
triangular, this is rounding the unknowns of ||R (w − s·k)||² from the last to the first, each given those after it
(Babai's nearest plane, arXiv 2507.18553): the same codes without inverting H. The BitsFusion paper does not have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codec.grid import code_range
from ..codec.rate_distortion import PRICE, cheap_codes

# Damping that is added to the diagonal, as a share of its mean, so that directions which the samples hardly show do
# not absorb the errors of the others. 0.03 was the best of 0.0001 to 0.1 (docs/METHOD.md).
DAMPING = 0.03

# Number of columns that are rounded between two matrix products that carry their errors to the rest.
_BLOCK = 128


@dataclass(frozen=True)
class Factor:
    """Damped second moment of the columns `start` … `start + size - 1`, factorized in the order of rounding.

    Attributes:
        upper: fp32 [size, size], R with Rᵀ R = H[order][:, order] + damping.
        order: int64 [size]; columns are rounded from the last of this list to the first.
        start: first column of the weight that the factor covers.
    """

    upper: Tensor
    order: Tensor
    start: int = 0

    @property
    def columns(self) -> slice:
        """Columns of the weight that the factor covers."""
        return slice(self.start, self.start + len(self.order))


def factorize(second_moment: Tensor, start: int = 0, damping: float = DAMPING) -> Factor:
    """Factorize a second moment, ordered so that columns with strong inputs are rounded first.

    Args:
        second_moment: fp32 [size, size], symmetric and positive semidefinite up to rounding errors. All zeros count as
            the identity: nothing is known of such inputs, and rounding becomes plain.
        start: column of the weight that its first row and column belong to.
        damping: share of the diagonal's mean that is added to the diagonal; ten times more while the result is not
            positive definite.

    Returns:
        The factor of the damped second moment.
    """
    diagonal = second_moment.diagonal()
    order, level = diagonal.argsort(), float(diagonal.mean())
    if level <= 0:
        return Factor(torch.eye(len(order), device=order.device), order, start)
    damped = second_moment[order.unsqueeze(1), order]
    while True:
        damped.diagonal().add_(damping * level)
        upper, failed = torch.linalg.cholesky_ex(damped, upper=True)
        if not failed:
            return Factor(upper, order, start)
        damping *= 10


def round_with_compensation(
    weight: Tensor,
    factors: Sequence[Factor],
    scale: Tensor,
    bits: int,
    *,
    balance: bool = True,
    symbols: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Round to codes at given scales, each column's error compensated in the columns that are rounded after it.

    Args:
        weight: fp32 [rows, columns], one row per output channel.
        factors: factors of blocks that together cover the columns; blocks do not compensate each other's errors.
        scale: fp32 [rows], positive.
        bits: number of bits, 1 to 8.
        balance: whether the grid has 2**bits + 1 symmetric levels; `False` for the plain grid of 2**bits.
        symbols: fp32 [levels], bits that each level takes in the file; codes are then those of least squared error of
            the output + `codec.rate_distortion.PRICE` × bits, on the balanced grid. None for the nearest codes.

    Returns:
        codes int8 [rows, columns]; residual fp32 [rows, columns] in the factors' order, R (w − s·k), whose squares add
        up to the mean square error of the output.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    residual = torch.empty_like(weight)
    low, high = code_range(bits, balance)
    level = torch.cat([factor.upper.diagonal() for factor in factors]).square().mean()
    for factor in factors:
        columns = factor.columns
        prices = None
        if symbols is not None:  # A column's squared error counts by the square of its diagonal element.
            prices = PRICE * level * symbols / factor.upper.diagonal().square().unsqueeze(1)
        rounded, residual[:, columns] = _round_block(
            weight[:, columns][:, factor.order], factor, scale, (low, high), prices
        )
        codes[:, columns][:, factor.order] = rounded
    return codes, residual


def _round_block(
    weight: Tensor, factor: Factor, scale: Tensor, code_limits: tuple[int, int], prices: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return codes and residual of columns that stand in the factor's order.

    Args:
        weight: fp32 [rows, columns].
        factor: factor of the columns.
        scale: fp32 [rows].
        code_limits: smallest and largest code.
        prices: fp32 [columns, levels], price of each code in squared steps; None for the nearest codes.
    """
    inverse, diagonal = scale.reciprocal(), factor.upper.diagonal()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    residual = torch.empty_like(weight)
    error = torch.zeros_like(weight)  # It is w − s·k of the rounded columns.
    for stop in range(weight.shape[1], 0, -_BLOCK):
        part = slice(max(0, stop - _BLOCK), stop)
        shares = factor.upper[part] / diagonal[part].unsqueeze(1)
        # Values of the columns that would leave no residual, given the errors of the rounded columns. They are
        # transposed, so that each column is contiguous in memory.
        ideal = (weight[:, part] + error[:, stop:] @ shares[:, stop:].T).T.contiguous()
        exact, rounded, inner = weight[:, part].T.contiguous(), torch.empty_like(ideal), shares[:, part].T.contiguous()
        for column in range(len(ideal) - 1, -1, -1):
            code = torch.mul(ideal[column], inverse, out=rounded[column])
            if prices is None:
                code.round_().clamp_(*code_limits)
            else:
                code.copy_(cheap_codes(code, prices[part.start + column]))
            ideal[:column].addr_(inner[column, :column], torch.addcmul(exact[column], code, scale, value=-1))
        codes[:, part] = rounded.T
        error[:, part] = (exact - rounded * scale).T
        residual[:, part] = ((ideal - rounded * scale) * diagonal[part].unsqueeze(1)).T
    return codes, residual


def project(weight: Tensor, factors: Sequence[Factor]) -> Tensor:
    """Return R w of each row, fp32 [rows, columns] in the factors' order.

    Args:
        weight: fp32 [rows, columns].
        factors: as in `round_with_compensation`.
    """
    projected = torch.empty_like(weight)
    for factor in factors:
        columns = factor.columns
        projected[:, columns] = weight[:, columns][:, factor.order] @ factor.upper.T
    return projected
