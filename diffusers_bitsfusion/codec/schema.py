"""What a packed checkpoint says of itself (docs/FORMAT.md), typed and checked: layers, time features, coding.

The `quantization_config` of config.json is read into these classes by `from_json` and written from them by `to_json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from ..utils.errors import shown
from ..utils.installation import install_command
from ..utils.json_files import is_number
from ..utils.safetensors_files import MAX_DIMENSIONS
from .grid import check_bits

# Newest version of the file format, raised when older readers could not read it. A file has the oldest version that
# describes it: 2 where parameters are packed that belong to no ordinary Linear or Conv2d layer, 3 where the table of
# time features is of low rank.
FORMAT_VERSION = 3
_LAYERS_VERSION, _TENSORS_VERSION, _LOW_RANK_VERSION = 1, 2, FORMAT_VERSION

# Prefix of a parameter's name in the name of the module that holds its codes.
TENSOR_PREFIX = "packed_"

COMPRESSIONS = ("zstd", None)
TIME_FEATURES = ("keep", "table", "cache")

# Largest number of timesteps in a table, which bounds the memory that a file can request; third differences of more
# timesteps overflow int16.
MAX_TIMESTEPS = 3800

# Largest width of a time embedding in a table, which bounds the same.
MAX_EMBEDDING_WIDTH = 1 << 16

# Largest rank of a table of time features, which bounds the same.
MAX_TABLE_RANK = 128

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
    """

    bits: int
    shape: tuple[int, ...]
    branch_rank: int = 0
    order: tuple[int, ...] = ()
    row_dims: int = 1

    @property
    def rows(self) -> int:
        """Output channels."""
        return math.prod(self.shape[: self.row_dims])

    @property
    def columns(self) -> int:
        """Weights of an output channel."""
        return math.prod(self.shape[self.row_dims :])

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
        return cls(bits, tuple(shape), rank, tuple(order), row_dims)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        content: dict[str, Any] = {"bits": self.bits, "shape": list(self.shape)}
        if self.branch_rank:
            content["branch_rank"] = self.branch_rank
        if self.order:
            content["order"] = list(self.order)
        if self.row_dims != 1:
            content["row_dims"] = self.row_dims
        return content


@dataclass(frozen=True)
class TimeFeaturesSchema:
    """What stands where the time embedding of a model was.

    Attributes:
        kind: "keep": the time embedding itself; "table": features of all training timesteps; "cache": of some.
        features: (block name, number of features) of each ResBlock, in order.
        removed_weights: weights of the time embedding that was taken out.
        removed_parameters: its parameters, biases included.
        timesteps: of a cache.
        num_timesteps: of a table.
        embedding_width: width of the time embedding that a table has beside the features; 0 where it has none.
        rank: number of functions of time that all features of a table are sums of; 0 where each is kept by itself.
    """

    kind: str = "keep"
    features: tuple[tuple[str, int], ...] = ()
    removed_weights: int = 0
    removed_parameters: int = 0
    timesteps: tuple[float, ...] = ()
    num_timesteps: int = 0
    embedding_width: int = 0
    rank: int = 0

    @property
    def num_features(self) -> int:
        """Features of all blocks together."""
        return sum(size for _, size in self.features)

    @property
    def part_sizes(self) -> list[int]:
        """Number of features of each block, and the width of the time embedding that follows them, if any."""
        return [size for _, size in self.features] + [self.embedding_width] * (self.embedding_width > 0)

    @property
    def num_columns(self) -> int:
        """Columns of all parts together."""
        return sum(self.part_sizes)

    @classmethod
    def from_json(cls, content: Any) -> TimeFeaturesSchema:
        """Read the `time_embedding` of a checkpoint.

        Raises:
            ValueError: a key is missing, or holds an impossible value; the message names it.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"time_embedding of a checkpoint must be an object, got {shown(content)}")
        kind = check_time_features(content)
        if kind == "keep":
            return cls()
        features = content.get("features")
        if not isinstance(features, list) or not all(
            isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and is_count(entry[1])
            for entry in features
        ):
            raise ValueError(
                'time_embedding["features"] must list a block name and a number of features for each block'
            )
        counts = ["removed_weights", "removed_parameters", *(["num_timesteps"] if kind == "table" else [])]
        for key in counts:
            if not is_count(content.get(key)):
                raise ValueError(f'time_embedding["{key}"] must be a number from 0, got {content.get(key)!r}')
        num_timesteps = content["num_timesteps"] if kind == "table" else 0
        if num_timesteps > MAX_TIMESTEPS:
            raise ValueError(f'time_embedding["num_timesteps"] must be at most {MAX_TIMESTEPS}')
        width = content.get("embedding_width", 0) if kind == "table" else 0
        if not is_count(width) or width > MAX_EMBEDDING_WIDTH:
            raise ValueError(
                f'time_embedding["embedding_width"] must be from 0 to {MAX_EMBEDDING_WIDTH}, got {width!r}'
            )
        rank = content.get("rank", 0) if kind == "table" else 0
        if not is_count(rank) or rank > MAX_TABLE_RANK:
            raise ValueError(f'time_embedding["rank"] must be from 0 to {MAX_TABLE_RANK}, got {rank!r}')
        return cls(
            kind=kind,
            features=tuple((name, size) for name, size in features),
            removed_weights=content["removed_weights"],
            removed_parameters=content["removed_parameters"],
            timesteps=tuple(content["timesteps"]) if kind == "cache" else (),
            num_timesteps=num_timesteps,
            embedding_width=width,
            rank=rank,
        )

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        width = {"embedding_width": self.embedding_width} if self.embedding_width else {}
        return self.meaning() | width

    def meaning(self) -> dict[str, Any]:
        """Return what checksums cover: the keys that every reader of the format knows."""
        if self.kind == "keep":
            return {"type": "keep"}
        steps: dict[str, Any] = {"num_timesteps": self.num_timesteps}
        if self.kind == "cache":
            steps = {"timesteps": list(self.timesteps)}
        if self.rank:  # No reader that knows it is without the width, whose columns are among the coefficients.
            steps |= {"rank": self.rank, "embedding_width": self.embedding_width}
        return {
            "type": self.kind,
            "features": [list(entry) for entry in self.features],
            "removed_weights": self.removed_weights,
            "removed_parameters": self.removed_parameters,
            **steps,
        }


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


def format_version_of(layers: Iterable[str], time: TimeFeaturesSchema) -> int:
    """Return the oldest version of the format that describes packed layers of these names, and these time features."""
    if time.rank:
        return _LOW_RANK_VERSION
    return _TENSORS_VERSION if any(is_tensor_name(name) for name in layers) else _LAYERS_VERSION


def is_tensor_name(name: str) -> bool:
    """Return whether a name in `layers` is that of a packed parameter rather than of an ordinary layer."""
    return name.rpartition(".")[2].startswith(TENSOR_PREFIX)


def check_time_features(content: Mapping[str, Any]) -> str:
    """Return the kind of a `time_embedding` object, as a user or a checkpoint writes it.

    Raises:
        ValueError: there is no such kind, or a cache has no distinct timesteps.
    """
    kind, timesteps = content.get("type"), content.get("timesteps")
    if not isinstance(kind, str) or kind not in TIME_FEATURES:
        raise ValueError(f'time_embedding["type"] must be "cache", "table" or "keep", got {kind!r}')
    if kind == "cache" and not (
        isinstance(timesteps, (list, tuple))
        and timesteps
        and all(is_number(t) for t in timesteps)
        and len(set(timesteps)) == len(timesteps)
    ):
        raise ValueError(
            'time_embedding["timesteps"] must be a list of distinct numbers, for example '
            f"sorted(set(scheduler.timesteps.tolist())) after scheduler.set_timesteps(...); got {shown(timesteps)}"
        )
    return kind


def check_balance(balance: Any) -> bool:
    """Return `balance` if it is one.

    Raises:
        ValueError: it is neither True nor False.
    """
    if not isinstance(balance, bool):
        raise ValueError(f"balance must be True or False, got {balance!r}")
    return balance


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


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether a value is an integer from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
