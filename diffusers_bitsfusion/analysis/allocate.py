"""Allocation of bits for an analysed model, by any of the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..allocation.data_free import allocate_data_free
from ..allocation.knapsack import knapsack
from ..allocation.paper_rule import ETA, paper_rule
from ..codec.grid import cost_in_bits
from ..config.recipe import Recipe
from .layer_cost import WIDTHS
from .results import Analysis

RULES = ("knapsack", "paper", "data-free")


def predicted_sensitivity(analysis: Analysis) -> dict[str, list[float]]:
    """Return the sensitivity of each layer at 1 to 7 bits, by layer name.

    Above the measured bits it falls as the layer's squared weight error does: small changes of a weight change the
    output in proportion, so that the squared change of the image follows the squared error.
    """
    measured = {bits: analysis.damage(bits) for bits in analysis.header.bits}
    last = max(measured)
    predicted = {}
    for name, layer in analysis.header.layers.items():
        error = layer.weight_error
        per_error = measured[last][name] / error[last - 1] if error[last - 1] else 0.0
        predicted[name] = [
            measured[bits][name] if bits in measured else per_error * error[bits - 1]
            for bits in range(1, len(error) + 1)
        ]
    return predicted


@dataclass(frozen=True)
class Totals:
    """Bits, bytes and predicted sensitivity of a recipe.

    Attributes:
        paper_bits: the paper's average bits a weight (section 5), first and last layer and time embedding included.
        layer_bits: log2(levels) averaged over the weights of the recipe's layers.
        bytes: bytes of the recipe's layers in the file, entropy coded, scales included.
        sensitivity: predicted sensitivity, summed over the layers.
    """

    paper_bits: float
    layer_bits: float
    bytes: int
    sensitivity: float

    def __str__(self) -> str:
        return (
            f"bits a weight         {self.layer_bits:.4f} over these layers, {self.paper_bits:.4f} by the formula\n"
            f"bytes in the file     {self.bytes:,}\n"
            f"predicted sensitivity {self.sensitivity:.4g}"
        )

    @classmethod
    def of(cls, recipe: Mapping[str, int], analysis: Analysis) -> Totals:
        """Return the totals of a recipe for an analysed model."""
        header = analysis.header
        bits = sum(cost_in_bits(n) * header.layers[name].weights for name, n in recipe.items())
        sensitivity = predicted_sensitivity(analysis)
        return cls(
            paper_bits=(bits + header.fixed_bits) / header.weights,
            layer_bits=bits / sum(analysis.sizes.values()),
            bytes=sum(header.layers[name].bytes[n - 1] for name, n in recipe.items()),
            sensitivity=sum(sensitivity[name][n - 1] for name, n in recipe.items()),
        )


def allocate(
    analysis: Analysis,
    target_bits: float = 1.99,
    *,
    rule: str = "knapsack",
    max_bytes: int | None = None,
    eta: float = ETA,
) -> Recipe:
    """Allocate bits to the layers of an analysed model.

    Args:
        analysis: analysis by any method; `analysis.by(metric)` to use another of its metrics as sensitivity.
        target_bits: average bits a weight by the paper's formula, as in `BitsFusionConfig`.
        rule: "knapsack" for the smallest total sensitivity whose layers have no more bytes in the file, entropy coded,
            than those of the data-free allocation to the target; "paper" for threshold and CLIP percentiles (paper,
            section 5), the latter where the analysis has CLIP scores; "data-free" for sizes alone.
        max_bytes: upper bound of the bytes of the recipe's layers in the file, entropy coded and with their scales,
            instead of `target_bits`.
        eta: exponent of the size in the paper's rule.

    Raises:
        ValueError: the rule is unknown, or no assignment reaches the target.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}.")
    if max_bytes is None:
        fixed = analysis.header.fixed_bits / analysis.header.weights
        target = f"target_bits={target_bits}, of which first and last layer and time embedding take {fixed:.2f},"
    else:
        target = f"max_bytes={max_bytes}"
    try:
        bits = _bits(analysis, target_bits, rule, max_bytes, eta)
    except ValueError as error:
        raise ValueError(f"{target} cannot be reached for this model: {error}.") from error
    budget = f"target_bits={target_bits}" if max_bytes is None else f"max_bytes={max_bytes}"
    header = analysis.header
    source = f"{rule} rule, {budget}, {header.method} analysis of {header.model['class']} by {header.metrics[0]}"
    return Recipe(bits, source=source, shapes=analysis.shapes)


def _bits(analysis: Analysis, target_bits: float, rule: str, max_bytes: int | None, eta: float) -> dict[str, int]:
    header, sizes = analysis.header, analysis.sizes
    file_bytes = {name: layer.bytes for name, layer in header.layers.items()}
    cost: Mapping[str, Sequence[float]] = file_bytes
    budget: float
    if max_bytes is not None:
        budget = max_bytes
    else:
        cost = {name: [cost_in_bits(n) * size for n in WIDTHS] for name, size in sizes.items()}
        budget = target_bits * header.weights - header.fixed_bits
    if rule == "paper":
        measured = {n: analysis.damage(n) for n in header.bits}
        return paper_rule(measured, sizes, cost, budget, eta=eta, clip_drop=analysis.clip_drop(max(header.bits)))
    if rule == "knapsack":
        if max_bytes is None:
            max_bytes = _bytes_of(allocate_data_free(sizes, budget), file_bytes)
        return knapsack(predicted_sensitivity(analysis), file_bytes, max_bytes)
    if max_bytes is None:
        return allocate_data_free(sizes, budget)
    return _data_free_within(max_bytes, sizes, file_bytes)


def _bytes_of(bits: Mapping[str, int], file_bytes: Mapping[str, Sequence[int]]) -> int:
    return sum(file_bytes[name][n - 1] for name, n in bits.items())


def _data_free_within(
    max_bytes: int, sizes: Mapping[str, int], file_bytes: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Return the data-free allocation with the most bits that fits into `max_bytes`, by bisection.

    Raises:
        ValueError: even 1 bit everywhere does not fit.
    """
    low, high = (cost_in_bits(n) * sum(sizes.values()) for n in (WIDTHS[0], WIDTHS[-1]))
    best = allocate_data_free(sizes, low)
    if _bytes_of(best, file_bytes) > max_bytes:
        raise ValueError(f"1 bit everywhere takes {_bytes_of(best, file_bytes)} bytes")
    for _ in range(40):  # 40 halvings make the interval smaller than a bit.
        middle = (low + high) / 2
        candidate = allocate_data_free(sizes, middle)
        if _bytes_of(candidate, file_bytes) <= max_bytes:
            best, low = candidate, middle
        else:
            high = middle
    return best
