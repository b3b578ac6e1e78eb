"""Arguments of the compiled loops: each the struct of the same name in C, whose sizes are compared at loading."""

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
    """Arguments of the loop in `decode.c`."""

    _fields_ = [*_pointers("dense", "scale", "out"), *_integers("columns", "row_bytes_in", "bits", "kind")]


class QuantizeArguments(Arguments):
    """Arguments of the loop in `quantize.c`."""

    _fields_ = [
        *_pointers("weight", "dense", "scale"),
        *_integers("columns", "row_bytes_out", "dtype", "bits", "balance", "starts", "iterations"),
        ("gaussian_step", ctypes.c_double),
        *_FAILED,
    ]


class RepackArguments(Arguments):
    """Arguments of the loop in `repack.c`."""

    _fields_ = [*_pointers("packed", "dense"), *_integers("columns", "row_bytes", "row_bytes_out", "bits"), *_FAILED]


class TokenArguments(Arguments):
    """Arguments of the rounding of tokens in `activations.c`."""

    _fields_ = [*_pointers("x", "codes", "scale"), *_integers("columns", "dtype")]


class RangeArguments(Arguments):
    """Arguments of the range of values in `activations.c`."""

    _fields_ = [*_pointers("x", "bounds"), *_integers("count", "chunk", "dtype")]


class AffineArguments(Arguments):
    """Arguments of the rounding of images in `activations.c`."""

    _fields_ = [*_pointers("x", "codes", "inverse", "zero_point"), *_integers("count", "chunk", "dtype")]


class RescaleArguments(Arguments):
    """Arguments of the rescaling of sums in `activations.c`."""

    _fields_ = [
        *_pointers("sums", "token_scale", "weight_scale", "bias", "out"),
        *_integers("columns", "dtype"),
    ]


class GegluArguments(Arguments):
    """Arguments of the loop of gated activations in `activations.c`."""

    _fields_ = [*_pointers("x", "out"), *_integers("columns", "dtype")]


class GroupNormArguments(Arguments):
    """Arguments of the loops in `norms.c`."""

    _fields_ = [
        *_pointers("x", "weight", "bias", "shift", "moments", "out"),
        *_integers("channels", "positions", "groups", "dtype", "silu", "block"),
        ("eps", ctypes.c_double),
    ]


class BlockArguments(Arguments):
    """Arguments of the loop in `blocked.c`."""

    _fields_ = [*_pointers("plain", "blocked"), *_integers("outputs", "inputs", "taps", "block", "group")]


class DecodeBlockedArguments(Arguments):
    """Arguments of the loop in `decode_blocked.c`."""

    _fields_ = [
        *_pointers("dense", "scale", "blocked"),
        *_integers("outputs", "inputs", "taps", "row_bytes_in", "bits", "kind", "block"),
        *_FAILED,
    ]


class ProductArguments(Arguments):
    """Arguments of the loop in `products.c`."""

    _fields_ = [
        *_pointers("image", "weight", "sums"),
        *_integers("first", "count", "flip", "zero_point"),
        *_integers("height", "width", "inputs", "out_height", "out_width", "outputs"),
        *_integers(
            "kernel_height", "kernel_width", "stride_y", "stride_x", "pad_y", "pad_x", "dilation_y", "dilation_x"
        ),
        *_integers("bits", "panels", "groups"),
        *_FAILED,
    ]


class Strides(ctypes.Structure):
    """Strides of queries, keys, values or outputs, in elements; those of a head's entries are 1."""

    _fields_ = _integers("batch", "head", "token")


class AttentionArguments(Arguments):
    """Arguments of the loop in `attention.c`."""

    _fields_ = [
        *_pointers("q", "k", "v", "out"),
        *[(name, Strides) for name in ("q_strides", "k_strides", "v_strides", "out_strides")],
        *_integers("heads", "queries", "keys", "width", "dtype"),
    ]


# The arguments of each loop of the library.
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
    "group_norm": GroupNormArguments,
    "group_moments": GroupNormArguments,
    "group_norm_channels_last": GroupNormArguments,
    "block_weight": BlockArguments,
    "decode_blocked": DecodeBlockedArguments,
    "multiply": ProductArguments,
    "attention": AttentionArguments,
}
