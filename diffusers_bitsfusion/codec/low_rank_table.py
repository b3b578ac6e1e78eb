"""Time features of all timesteps as sums of a few functions of time, where few suffice.

The features of a trained model move together: those of the shapes pipeline, 928 with its time embedding, are sums of
44 functions of time within 0.44 %. The functions at every timestep, and each feature's share of each of them, then
take a tenth of the bytes of a code for every feature and timestep (`codec.time_table`), at no more error. The
functions are the principal components (Karhunen–Loève transform), all quantized with a step that leaves each the same
error, so that small ones take few bits (reverse water-filling; Cover and Thomas, section 10.3). The BitsFusion paper
keeps the features of given timesteps only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .entropy import compress, decompress
from .time_schema import MAX_TABLE_RANK
from .time_table import RELATIVE_ERROR, from_bytes, to_bytes

# Share of the squared error of quantization that the coefficients have; the functions have the rest.
_SHARE = 0.65
# Ranks that are tried differ by so much.
_STEP = 4
# Rounds in which the steps are fitted to the error that they give.
_ROUNDS = 3
# Number of columns that tell whether a low rank can do at all.
_SAMPLE = 512
# Functions are coded as such differences along time: of first to third ones, those that take the fewest bytes.
_DIFFERENCES = 2
_LARGEST_CODE = 32767


@dataclass(frozen=True)
class LowRankTable:
    """Table [timesteps, columns] as basis · coefficients.

    Attributes:
        basis: int16 [timesteps, rank], codes of functions of time.
        basis_scale: fp32 [rank], positive.
        coefficients: int16 [rank, columns], codes of each column's shares of the functions.
        scale: fp32 [columns], positive; the same for all columns of a part.
    """

    basis: Tensor
    basis_scale: Tensor
    coefficients: Tensor
    scale: Tensor

    @property
    def rank(self) -> int:
        """Number of functions."""
        return self.basis.shape[1]

    def dense(self) -> Tensor:
        """Return the table, fp32 [timesteps, columns]."""
        return self.basis.float() * self.basis_scale @ self.coefficients.float() * self.scale

    def file_bytes(self) -> int:
        """Return the bytes that the codes take in the file."""
        return encode_basis(self.basis).numel() + encode_coefficients(self.coefficients).numel()


def factorize(parts: Sequence[Tensor]) -> LowRankTable | None:
    """Return a table of low rank with as little error as `time_table.quantize_table`, in the rank of fewest bytes.

    Args:
        parts: features of each block, and the time embedding, fp32 [timesteps, columns] each.

    Returns:
        Table of the parts side by side, on the CPU, with a root mean square error of at most 0.44 % of that of each
        part's features, on average over the parts' columns. None where `MAX_TABLE_RANK` functions do not suffice.
    """
    scales = [_scale(part) for part in parts]
    every = max(1, sum(part.shape[1] for part in parts) // _SAMPLE)
    sample = _side_by_side([part[:, ::every] for part in parts], scales)
    lost = torch.linalg.eigvalsh(sample.T @ sample)[:-MAX_TABLE_RANK].sum()
    if lost > RELATIVE_ERROR**2 * sample.square().sum():
        return None
    table = _side_by_side(parts, scales)
    allowed = RELATIVE_ERROR**2 * table.square().sum()
    scale = torch.cat([scale.expand(part.shape[1]) for scale, part in zip(scales, parts, strict=True)])
    energies, functions = torch.linalg.eigh(table @ table.T)
    left_over = energies.clamp_min(0).cumsum(0).flip(0)  # The first `index` functions leave so much.
    best, fewest = None, math.inf
    for rank in range(_STEP, min(MAX_TABLE_RANK, len(energies) - 1) + 1, _STEP):
        if (room := float(allowed - left_over[rank])) <= 0:
            continue
        found = _quantize(table, functions[:, -rank:].flip(1), room, scale)
        if found is None:
            continue
        size = found.file_bytes()
        if size >= fewest:
            break
        best, fewest = found, size
    return best


def _scale(part: Tensor) -> Tensor:
    rms = part.square().mean().sqrt().cpu()
    return torch.where(rms > 0, rms, 1.0)


def _side_by_side(parts: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """Return the columns of all parts, each divided by its part's scale, fp64 on the CPU."""
    return torch.cat([part.cpu().double() / scale for part, scale in zip(parts, scales, strict=True)], dim=1)


def _quantize(table: Tensor, functions: Tensor, room: float, scale: Tensor) -> LowRankTable | None:
    """Return the table of given functions, quantized so that its squared error grows by `room`.

    Where some columns are far larger than others a code may exceed 16 bits; None then.

    Args:
        table: fp64 [timesteps, columns], each part divided by its scale.
        functions: fp64 [timesteps, rank], orthonormal.
        room: squared error, a sum over the table.
        scale: fp32 [columns].
    """
    exact = functions.T @ table
    dropped = table.square().sum() - exact.square().sum()
    variance = room / table.numel()
    for _ in range(_ROUNDS):
        step = math.sqrt(12 * variance * _SHARE * len(table) / len(exact))
        coefficients = (exact / step).round_()
        coefficients = coefficients[coefficients.any(dim=1)]
        spread = coefficients.square().mean(dim=1).sqrt()
        gram = coefficients @ coefficients.T
        # These functions have the least error with the rounded coefficients.
        fitted = torch.linalg.solve(gram, coefficients @ table.T).T
        basis_scale = math.sqrt(12 * variance * (1 - _SHARE) / len(spread)) / spread
        basis = (fitted / basis_scale).round_()
        error = (basis * basis_scale @ coefficients - table).square().sum()
        variance *= float(room / (error - dropped).clamp_min(room / 4))
    if max(basis.abs().max(), coefficients.abs().max()) > _LARGEST_CODE:
        return None
    return LowRankTable(basis.to(torch.int16), basis_scale.float(), coefficients.to(torch.int16), scale.float())


def encode_basis(basis: Tensor) -> Tensor:
    """Encode functions of time, int16 [timesteps, rank], as one zstd frame, uint8 [frame bytes].

    Second differences along time (the rows before the first are zero), modulo 2^16, transposed, as
    `encode_coefficients` encodes them.
    """
    differences = basis
    for _ in range(_DIFFERENCES):
        differences = torch.diff(differences, dim=0, prepend=torch.zeros_like(differences[:1]))
    return encode_coefficients(differences.T)


def decode_basis(frame: Tensor, timesteps: int, rank: int) -> Tensor:
    """Decode a frame of `encode_basis`, int16 [timesteps, rank]; raises as `decode_coefficients`."""
    sums = decode_coefficients(frame, rank, timesteps).T.to(torch.int64)
    for _ in range(_DIFFERENCES):
        sums = sums.cumsum(dim=0)
    return ((sums + (1 << 15) & 0xFFFF) - (1 << 15)).to(torch.int16).contiguous()


def encode_coefficients(codes: Tensor) -> Tensor:
    """Encode codes int16 [rank, columns] as one zstd frame, uint8 [frame bytes]: `to_bytes`, all low ones first."""
    return compress(torch.stack(to_bytes(codes)))


def decode_coefficients(frame: Tensor, rank: int, columns: int) -> Tensor:
    """Decode a frame of `encode_coefficients`, int16 [rank, columns].

    Raises:
        ValueError: the frame is damaged or holds codes of another number.
    """
    return from_bytes(*decompress(frame, 2 * rank * columns).view(2, rank, columns))
