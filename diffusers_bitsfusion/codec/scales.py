"""Per-output-channel scales and the codes that go with them (paper, section 3.2 "scaling factor initialization")."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .grid import code_range, half_range
from .rounding import Rounding

# Step that minimises the squared error of a unit Gaussian at 1 to 8 bits, found by numerical minimisation.
GAUSSIAN_STEP = {
    True: (1.22401, 0.84299, 0.53382, 0.31890, 0.18331, 0.10268, 0.05648, 0.03087),
    False: (1.22401, 1.04839, 0.60182, 0.33861, 0.18879, 0.10418, 0.05689, 0.03087),
}

_FLOAT = torch.finfo(torch.float32)

# Exponent of the powers of two up to which rows are not rescaled.
_ORDINARY_EXPONENT = 40

# Elements processed at once: a tile and its codes stay in a core's cache.
_TILE = 1 << 16


def round_scale(scale: Tensor, dtype: str) -> Tensor:
    """Return scales fp32 rounded to what a file with scales of `dtype` holds, fp32 of the same shape.

    A scale in bfloat16 is within 2^-9 of its own size: the squared error that this adds is a hundredth of that of
    rounding to 8 bits, and less of fewer bits.

    Args:
        scale: positive, fp32.
        dtype: "float32" or "bfloat16".
    """
    return scale if dtype == "float32" else scale.to(torch.bfloat16).to(scale.dtype)


def quantize_rows(weight: Tensor, bits: int, rounding: Rounding = Rounding()) -> tuple[Tensor, Tensor]:
    """Return scale and codes of each row, minimising ||scale * codes - weight||^2 row by row.

    Args:
        weight: floating [rows, columns], one row per output channel; worked on in fp32.
        bits: 1 to 8.
        rounding: how scales are found, on which grid.

    Returns:
        codes int8 [rows, columns], scale fp32 [rows], positive, finite and normal. A row of zeros gets codes 0 and
        scale 1. Weights of any size that fp32 holds are rounded as those of size one.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, dtype=torch.float32, device=weight.device)
    step = max(1, _TILE // columns if weight.device.type == "cpu" else rows)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        tile = weight[part].float()
        exponent = _exponents(tile)
        tile = _times_power_of_two(tile, -exponent)
        if rounding.scale_init == "minmax":
            found = _one_where_zero(tile.abs().amax(dim=1) / half_range(bits))
        else:
            found = _alternating_scale(tile, bits, rounding.iterations, rounding.balance)
        largest = _FLOAT.max / half_range(bits)  # Its products with codes are finite.
        bounded = _times_power_of_two(found, exponent).clamp(_FLOAT.tiny, largest)
        scale[part] = torch.where(torch.isfinite(found), bounded, torch.nan)
        codes[part] = round_to_codes(tile, _times_power_of_two(scale[part], -exponent), bits, rounding.balance)
    check_finite(scale)
    return codes, scale


def check_finite(scale: Tensor) -> None:
    """Refuse scales [rows] of weights that are not finite, naming the first such row.

    Raises:
        ValueError: a scale is NaN or infinite.
    """
    finite = torch.isfinite(scale)
    if not finite.all():
        raise ValueError(f"output channel {int((~finite).nonzero()[0])} holds NaN or infinite values")


def num_starts(bits: int) -> int:
    """Return the number of steps that the alternation chooses its start from."""
    return 3 if bits < 5 else 9


def _exponents(tile: Tensor) -> Tensor:
    """Return powers of two [rows] that bring rows to the size of one; zero where fp32 holds their squares."""
    largest = tile.abs().amax(dim=1)
    exponent = torch.frexp(largest).exponent
    return torch.where(torch.isfinite(largest) & (exponent.abs() > _ORDINARY_EXPONENT), exponent, 0)


def _times_power_of_two(values: Tensor, exponent: Tensor) -> Tensor:
    """Return values [rows, ...] * 2**exponent [rows], in two steps: fp32 holds no power of two above 2**127."""
    if not exponent.any():
        return values
    exponent = exponent.view(-1, *[1] * (values.dim() - 1))
    half = exponent // 2
    return torch.ldexp(torch.ldexp(values, half), exponent - half)


def _one_where_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def round_to_codes(tile: Tensor, scale: Tensor, bits: int, balance: bool, out: Tensor | None = None) -> Tensor:
    """Return the nearest codes, floating [rows, columns], of `tile` fp32 [rows, columns] at `scale` fp32 [rows]."""
    low, high = code_range(bits, balance)
    return torch.mul(tile, scale.reciprocal().unsqueeze(1), out=out).round_().clamp_(low, high)


def _alternating_scale(tile: Tensor, bits: int, iterations: int, balance: bool) -> Tensor:
    codes = torch.empty_like(tile)

    def fit(scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return <w, k> and <k, k> of each row, k being the codes at `scale`.

        Sums are in fp64, so that their order is not seen.
        """
        round_to_codes(tile, scale, bits, balance, out=codes)
        return (tile * codes).sum(dim=1, dtype=torch.float64), codes.square().sum(dim=1, dtype=torch.float64)

    # The alternation finds the nearest local optimum, so it starts from the best of several steps: from the optimum of
    # a Gaussian to that of a uniform distribution (as layers have after initialisation), which lie further apart at
    # many levels. Min-max, the paper's comparison, is further off: it stops at 0.0122 instead of 0.0104 at 17 levels.
    mean_square = tile.double().square().sum(dim=1) / tile.shape[1]
    gaussian = (mean_square.sqrt() * GAUSSIAN_STEP[balance][bits - 1]).float()
    uniform = tile.abs().amax(dim=1) / (half_range(bits) + 0.5)
    scale, best = _one_where_zero(gaussian), torch.full_like(mean_square, torch.inf)
    for step in _geometric_steps(gaussian, uniform, num_starts(bits)):
        start = _one_where_zero(step)
        dot, norm = fit(start)
        error = start * (start * norm - 2 * dot)  # ||s k - w||^2 less the constant ||w||^2
        scale, best = torch.where(error < best, start, scale), torch.minimum(error, best)
    for _ in range(iterations):
        dot, norm = fit(scale)
        scale = torch.where(norm > 0, (dot / norm).float(), scale)
    # NaN compares false and would leave the start in place: carry it into the result instead.
    return torch.where(torch.isfinite(gaussian), scale, torch.nan)


def _geometric_steps(first: Tensor, last: Tensor, count: int) -> list[Tensor]:
    """Return `count` steps from `first` to `last`, a power of two and one, by square roots.

    Square roots round alike everywhere.
    """
    steps = [first, last]
    while len(steps) < count:
        between = [(a * b).sqrt() for a, b in itertools.pairwise(steps)]
        steps = [step for pair in zip(steps, between, strict=False) for step in pair] + [last]
    return steps
