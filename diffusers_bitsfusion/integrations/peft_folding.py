"""What LoRA and its variants in PEFT do to a weight: add a low-rank matrix and, of DoRA, multiply its rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

# Names of PEFT's classes of variants; versions of PEFT differ in which of them they have.
_DORA = ("DoraLinearVariant", "DoraConv2dVariant")
_KASA = "KasaLinearVariant"

# Names of variants that add a low-rank matrix. MiCA, MonteCLoRA and VeLoRA differ from LoRA in training alone.
_LOW_RANK = ("BdLoraLinearVariant", _KASA, "MiCALinearVariant", "MontecloraLinearVariant", "VeloraLinearVariant")

# Error of the factors of a matrix relative to it, of fp32.
_EXACT = 1e-6

# Number of vectors that the range of a matrix is first looked for with.
_FIRST = 16

# Rank up to which factors are taken although the matrix itself may be smaller: that of layers with few inputs or
# outputs, such as a model's first and last, beside which the others count.
_SMALL = 64


def why_not_foldable(layer: LoraLayer, name: str) -> str | None:
    """Why a variant of LoRA cannot be merged into packed weights, or None where it can.

    Args:
        layer: LoRA layer.
        name: name of the adapter.
    """
    variant = _variant(layer, name)
    if variant is None or variant in _LOW_RANK:
        return None
    if variant not in _DORA:
        return f"{variant} changes the weight by more than a low-rank matrix"
    magnitude = layer.lora_magnitude_vector[name].weight
    if not (torch.isfinite(magnitude) & (magnitude > 0)).all():
        return "its magnitudes must be positive and finite, since they go into scales"
    return None


def fold(layer: Any, names: Iterable[str]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what merging adapters does to a weight: its rows are multiplied, then up @ down is added.

    A DoRA multiplies what the adapters before it added, too, as in PEFT. Its factors are of the unmerged weight.

    Args:
        layer: LoRA layer around a packed layer into which nothing is merged.
        names: names of adapters, in the order in which they are merged.

    Returns:
        Down [rank, in, ...], up fp32 [out, rank, ...] and, where there is a DoRA, the factor of the rows, fp32 [out].
    """
    downs, ups, factor = [], [], None
    for name in names:
        down, up = low_rank_halves(layer, name)
        downs.append(down)
        ups.append(up)
        if _variant(layer, name) in _DORA:
            weight = layer.get_base_layer().dense_weight(torch.float32)
            adapted = weight.flatten(1) + up.flatten(1) @ down.float().flatten(1)
            magnitude = layer.lora_magnitude_vector[name].weight.detach().float().flatten()
            own = magnitude / torch.linalg.vector_norm(adapted, dim=1)
            ups = [by_rows(own, before) * before for before in ups]
            factor = own if factor is None else factor * own
    return torch.cat(downs), torch.cat(ups, dim=1), factor


def by_rows(factor: Tensor, like: Tensor) -> Tensor:
    """Return a factor of rows, [out], in a shape that multiplies the rows of a tensor like `like`."""
    return factor.view(-1, *[1] * (like.ndim - 1))


def low_rank_halves(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return the factors of the matrix that an adapter adds to the weight, before DoRA multiplies the rows.

    Args:
        layer: LoRA layer.
        name: name of the adapter.

    Returns:
        Down [rank, in, ...] and, times the adapter's scaling, up, fp32 [out, rank, ...], as a branch takes them.
    """
    down, up = _weight(layer.lora_A[name]), _weight(layer.lora_B[name]).float() * layer.scaling[name]
    if _variant(layer, name) == _KASA:
        up = up * layer.lora_diag[name].detach().float()
    return down, up


def _variant(layer: Any, name: str) -> str | None:
    """Return the name of the class of an adapter's variant, None of a plain LoRA."""
    variant = layer.lora_variant.get(name)
    return None if variant is None else type(variant).__name__


def _weight(half: Any) -> Tensor:
    as_matrix = getattr(half, "weight_as_blockdiagonal_matrix", None)  # BD-LoRA keeps the blocks alone.
    weight: Tensor = half.weight if as_matrix is None else as_matrix()
    return weight.detach()


def low_rank_factors(delta: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factor what an adapter adds to a weight, to the precision of its dtype.

    The range is found by products with random vectors, ever more of them (Halko, Martinsson and Tropp, 2011).

    Args:
        delta: floating [out, in, ...].

    Returns:
        Down fp32 [rank, in, ...] and up fp32 [out, rank, ...], as a branch takes them; None where they would have no
        fewer elements than `delta`, and a rank of more than 64.
    """
    matrix = delta.detach().flatten(1).double()
    rows, columns = matrix.shape
    allowed = max(_EXACT, torch.finfo(delta.dtype).eps / 2) * torch.linalg.matrix_norm(matrix)
    most, size = min(rows, columns, max((rows * columns - 1) // (rows + columns), _SMALL)), 0
    generator = torch.Generator(matrix.device).manual_seed(0)
    while size < most:
        size = min(most, max(_FIRST, 4 * size))
        vectors = torch.randn(columns, size, dtype=matrix.dtype, device=matrix.device, generator=generator)
        basis = torch.linalg.qr(matrix @ vectors).Q
        within = basis.T @ matrix
        if torch.linalg.matrix_norm(matrix - basis @ within) <= allowed:
            left, values, right = torch.linalg.svd(within, full_matrices=False)
            beyond = values.square().flip(0).cumsum(0).flip(0).sqrt()
            rank = int((beyond > allowed).sum())
            up = basis @ left[:, :rank] * values[:rank]
            ones = [1] * (delta.ndim - 2)
            return right[:rank].reshape(rank, *delta.shape[1:]).float(), up.reshape(rows, rank, *ones).float()
    return None
