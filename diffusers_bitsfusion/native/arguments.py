"""What the compiled loops are given: each the struct of the same name in C, whose sizes are compared at loading."""

from __future__ import annotations

import ctypes


def _pointers(*names: str) -> list[tuple[str, type[ctypes.c_void_p]]]:
    return [(name, ctypes.c_void_p) for name in names]


def _integers(*names: str) -> list[tuple[str, type[ctypes.c_int64]]]:
    return [(name, ctypes.c_int64) for name in names]


class Arguments(ctypes.Structure):
    """Arguments of a loop: pointers are addresses of tensors, which the caller keeps alive.

    Loops that allocate have a last field `failed`, which they set where there is no memory.
    """

    failed = 0


_FAILED = [("failed", ctypes.c_int32)]


class DecodeArguments(Arguments):
    """decode.c"""

    _fields_ = [*_pointers("dense", "scale", "out"), *_integers("columns", "row_bytes_in", "bits", "kind")]


class QuantizeArguments(Arguments):
    """quantize.c"""

    _fields_ = [
        *_pointers("weight", "dense", "scale"),
        *_integers("columns", "row_bytes_out", "dtype", "bits", "balance", "starts", "iterations"),
        ("gaussian_step", ctypes.c_double),
        *_FAILED,
    ]


class RepackArguments(Arguments):
    """repack.c"""

    _fields_ = [*_pointers("packed", "dense"), *_integers("columns", "row_bytes", "row_bytes_out", "bits"), *_FAILED]


class TokenArguments(Arguments):
    """activations.c"""

    _fields_ = [*_pointers("x", "codes", "scale"), *_integers("columns", "dtype")]


class RangeArguments(Arguments):
    """activations.c"""

    _fields_ = [*_pointers("x", "bounds"), *_integers("count", "chunk", "dtype")]


class AffineArguments(Arguments):
    """activations.c"""

    _fields_ = [*_pointers("x", "codes", "inverse", "zero_point"), *_integers("count", "chunk", "dtype")]


class RescaleArguments(Arguments):
    """activations.c"""

    _fields_ = [
        *_pointers("sums", "token_scale", "weight_scale", "bias", "out"),
        *_integers("columns", "dtype"),
    ]


class GegluArguments(Arguments):
    """activations.c"""

    _fields_ = [*_pointers("x", "out"), *_integers("columns", "dtype")]


class BlockArguments(Arguments):
    """blocked.c"""

    _fields_ = [*_pointers("plain", "blocked"), *_integers("outputs", "inputs", "taps", "block")]


class DecodeBlockedArguments(Arguments):
    """decode_blocked.c"""

    _fields_ = [
        *_pointers("dense", "scale", "blocked"),
        *_integers("outputs", "inputs", "taps", "row_bytes_in", "bits", "kind", "block"),
        *_FAILED,
    ]


class ProductArguments(Arguments):
    """products.c"""

    _fields_ = [*_pointers("tokens", "weight", "sums"), *_integers("columns", "out", "bits"), *_FAILED]


class Strides(ctypes.Structure):
    """Strides of queries, keys, values or outputs, in elements; those of a head's entries are 1."""

    _fields_ = _integers("batch", "head", "token")


class AttentionArguments(Arguments):
    """attention.c"""

    _fields_ = [
        *_pointers("q", "k", "v", "out"),
        *[(name, Strides) for name in ("q_strides", "k_strides", "v_strides", "out_strides")],
        *_integers("heads", "queries", "keys", "width", "dtype"),
    ]


# What each loop of the library takes.
ARGUMENTS: dict[str, type[Arguments]] = {
    "decode": DecodeArguments,
    "quantize": QuantizeArguments,
    "repack": RepackArguments,
    "quantize_tokens": TokenArguments,
    "range": RangeArguments,
    "quantize_affine": AffineArguments,
    "rescale": RescaleArguments,
    "rescale_geglu": RescaleArguments,
    "geglu": GegluArguments,
    "block_weight": BlockArguments,
    "decode_blocked": DecodeBlockedArguments,
    "multiply": ProductArguments,
    "attention": AttentionArguments,
}
