"""What a packed checkpoint says of its time features (docs/FORMAT.md), typed and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..utils.errors import shown
from ..utils.json_files import is_count, is_number

TIME_FEATURES = ("keep", "table", "cache")

# Largest number of timesteps in a table, which bounds the memory that a file can request; third differences of more
# timesteps overflow int16.
MAX_TIMESTEPS = 3800

# Largest width of a time embedding in a table, which bounds the same.
MAX_EMBEDDING_WIDTH = 1 << 16

# Largest rank of a table of time features, which bounds the same.
MAX_TABLE_RANK = 128


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
