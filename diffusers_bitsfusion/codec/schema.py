"""What a packed checkpoint says of itself (docs/FORMAT.md), typed and checked: layers, time features, coding.

The `quantization_config` of config.json is read into these classes by `from_json` and written from them by `to_json`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..utils.errors import shown
from ..utils.installation import install_command
from ..utils.json_files import is_count
from ..utils.safetensors_files import MAX_DIMENSIONS
from .grid import check_bits
from .time_schema import TimeFeaturesSchema

# Newest version of the file format, raised when older readers could not read it. A file has the oldest version that
# describes it: 2 where parameters are packed that belong to no ordinary Linear or Conv2d layer, 3 where the table of
# time features is of low rank, 4 where scales have 16 bits.
FORMAT_VERSION = 4
_LAYERS_VERSION, _TENSORS_VERSION, _LOW_RANK_VERSION, _SHORT_SCALES_VERSION = 1, 2, 3, FORMAT_VERSION

# Prefix of a parameter's name in the name of the module that holds its codes.
TENSOR_PREFIX = "packed_"

COMPRESSIONS = ("zstd", None)

# Values of `scale_dtype`.
SCALE_DTYPES = ("float32", "bfloat16")

# Largest rank of a low-rank branch, which bounds the memory that a file can request.
MAX_BRANCH_RANK = 1 << 16


@dataclass(frozen=True)
class LayerSchema:
    """One packed layer.

    Attributes:
        bits: 1 to 8.
        shape: of the weight, (out, in) or (out, in / groups, height, width).
        branch_rank: rank of the low-rank branch that fused LoRAs have left; 0 where there is none.
        order: axis of `shape` that each axis of the model's own parameter is, where they differ: (1, 0, 2, 3) for a
            transposed convolution. Empty where they do not.
        row_dims: number of leading axes of `shape` that make the rows; 2 for (experts, out, in).
        scale_dtype: of the scales, "float32" or "bfloat16".
    """

    bits: int
    shape: tuple[int, ...]
    branch_rank: int = 0
    order: tuple[int, ...] = ()
    row_dims: int = 1
    scale_dtype: str = "float32"

    @property
    def rows(self) -> int:
        """Output channels."""
        return math.prod(self.shape[: self.row_dims])

    @property
    def columns(self) -> int:
        """Weights of an output channel."""
        return math.prod(self.shape[self.row_dims :])

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale in the file."""
        return 4 if self.scale_dtype == "float32" else 2

    @property
    def num_weights(self) -> int:
        """Weights of the layer."""
        return math.prod(self.shape)

    @classmethod
    def from_json(cls, name: str, content: Any) -> LayerSchema:
        """Read the entry of the layer `name`.

        Raises:
            ValueError: the entry is none, or holds impossible values; the message names the layer.
        """
        if not isinstance(content, Mapping) or not {"bits", "shape"} <= set(content):
            raise ValueError(
                f"layers[{name!r}] must have the keys bits, shape and maybe branch_rank, got {shown(content)}"
            )
        bits, shape, rank = content["bits"], content["shape"], content.get("branch_rank", 0)
        check_bits(bits, f"bits of layer {name!r}")
        if not isinstance(shape, (list, tuple)) or not shape or not all(is_count(size) and size for size in shape):
            raise ValueError(f"shape of layer {name!r} must be a list of positive sizes, got {shown(shape)}")
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"shape of layer {name!r} has {len(shape)} sizes, more than any layer")
        if "branch_rank" in content and (not is_count(rank) or not 1 <= rank <= MAX_BRANCH_RANK):
            raise ValueError(f"branch_rank of layer {name!r} must be from 1 to {MAX_BRANCH_RANK}, got {rank!r}")
        order, row_dims = content.get("order", []), content.get("row_dims", 1)
        axes = list(range(len(shape)))
        if order and (not isinstance(order, list) or not all(map(is_count, order)) or sorted(order) != axes):
            raise ValueError(f"order of layer {name!r} must list each axis of its shape once, got {shown(order)}")
        if not is_count(row_dims) or not 1 <= row_dims <= len(shape):
            raise ValueError(f"row_dims of layer {name!r} must be from 1 to {len(shape)}, got {row_dims!r}")
        scale_dtype = check_scale_dtype(content.get("scale_dtype", "float32"), f"scale_dtype of layer {name!r}")
        return cls(bits, tuple(shape), rank, tuple(order), row_dims, scale_dtype)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        content: dict[str, Any] = {"bits": self.bits, "shape": list(self.shape)}
        if self.branch_rank:
            content["branch_rank"] = self.branch_rank
        if self.order:
            content["order"] = list(self.order)
        if self.row_dims != 1:
            content["row_dims"] = self.row_dims
        if self.scale_dtype != "float32":
            content["scale_dtype"] = self.scale_dtype
        return content


@dataclass(frozen=True)
class CheckpointSchema:
    """A packed checkpoint.

    Attributes:
        layers: the packed layers by module name.
        time_features: what stands where the time embedding was.
        balance: whether the grids are balanced (paper, section 3.1).
        compression: "zstd", or None for plain packed bytes.
        format_version: of the file's layout.
    """

    layers: Mapping[str, LayerSchema]
    time_features: TimeFeaturesSchema = field(default_factory=TimeFeaturesSchema)
    balance: bool = True
    compression: str | None = "zstd"
    format_version: int = _LAYERS_VERSION

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CheckpointSchema:
        """Read the `quantization_config` of a checkpoint; keys that belong to no schema are left to others.

        Raises:
            ValueError: the checkpoint is of a newer format version, or its config.json is damaged.
        """
        version = content.get("format_version")
        if version is None:
            raise ValueError("The checkpoint's quantization_config has no format_version: its config.json is damaged.")
        if not is_count(version):
            raise ValueError(f"format_version must be an integer, got {version!r}")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has BitsFusion format version {version}, newer than the version {FORMAT_VERSION} "
                f"that this diffusers_bitsfusion reads. Upgrade with `{install_command(upgrade=True)}`."
            )
        layers = content.get("layers")
        if not isinstance(layers, Mapping) or not layers:
            raise ValueError("The checkpoint's quantization_config lists no layers: its config.json is damaged.")
        return cls(
            layers={name: LayerSchema.from_json(name, layer) for name, layer in layers.items()},
            time_features=TimeFeaturesSchema.from_json(content.get("time_embedding")),
            balance=check_balance(content.get("balance", True)),
            compression=check_compression(content.get("compression", "zstd")),
            format_version=version,
        )

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {
            "format_version": self.format_version,
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
            "time_embedding": self.time_features.to_json(),
            "balance": self.balance,
            "compression": self.compression,
        }

    def with_time_features(self, time: TimeFeaturesSchema) -> CheckpointSchema:
        """Return the same checkpoint with other time features, in the oldest version of the format for them."""
        return replace(self, time_features=time, format_version=format_version_of(self.layers, time))

    def with_branch_ranks(self, ranks: Mapping[str, int]) -> CheckpointSchema:
        """Return the same checkpoint with other ranks of the layers' branches, by layer name; 0 where left out."""
        layers = {name: replace(layer, branch_rank=ranks.get(name, 0)) for name, layer in self.layers.items()}
        return replace(self, layers=layers)


def format_version_of(layers: Mapping[str, LayerSchema], time: TimeFeaturesSchema) -> int:
    """Return the oldest version of the format that describes these packed layers, by name, and these time features."""
    if any(layer.scale_dtype != "float32" for layer in layers.values()):
        return _SHORT_SCALES_VERSION
    if time.rank:
        return _LOW_RANK_VERSION
    return _TENSORS_VERSION if any(is_tensor_name(name) for name in layers) else _LAYERS_VERSION


def is_tensor_name(name: str) -> bool:
    """Return whether a name in `layers` is that of a packed parameter rather than of an ordinary layer."""
    return name.rpartition(".")[2].startswith(TENSOR_PREFIX)


def check_balance(balance: Any) -> bool:
    """Return `balance` if it is one.

    Raises:
        ValueError: it is neither True nor False.
    """
    if not isinstance(balance, bool):
        raise ValueError(f"balance must be True or False, got {balance!r}")
    return balance


def check_scale_dtype(dtype: Any, name: str = "scale_dtype") -> str:
    """Return the dtype of scales if there is such a one.

    Args:
        dtype: "float32" or "bfloat16".
        name: what to call it in the message.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(dtype, str) or dtype not in SCALE_DTYPES:
        raise ValueError(f"{name} must be one of {SCALE_DTYPES}, got {shown(dtype)}")
    return dtype


def check_compression(compression: Any) -> str | None:
    """Return `compression` if there is such a one.

    Raises:
        ValueError: there is none.
    """
    if not (compression is None or isinstance(compression, str)) or compression not in COMPRESSIONS:
        raise ValueError(f"compression must be one of {COMPRESSIONS} in this version, got {compression!r}")
    return compression


def branch_shapes(weight_shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a branch's two halves, (down, up), for a weight of `weight_shape`."""
    outputs, *inputs = weight_shape
    return (rank, *inputs), (outputs, rank, *(1 for _ in inputs[1:]))
