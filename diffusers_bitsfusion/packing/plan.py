"""What becomes of a model: its packed layers, their bits, and the form of its time embedding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..codec.rounding import Rounding
from ..codec.schema import CheckpointSchema, LayerSchema, format_version_of
from ..codec.time_schema import TimeFeaturesSchema
from ..nn.time_path import TimePath
from .tensors import TensorPlace

# Number of training timesteps of Stable Diffusion and of most diffusers schedulers.
_NUM_TIMESTEPS = 1000


@dataclass
class Plan:
    """Plan of quantizing a model.

    Attributes:
        bits: bits by name of every layer to pack.
        decided: names of the ordinary layers whose bits a recipe decides.
        time_embedding: "table", "cache" or "keep".
        timesteps: timesteps to cache, for "cache".
        time_path: path from the timestep to the features of each ResBlock; None where they depend on more than it.
        num_timesteps: number of training timesteps, for "table".
        rates: bits a weight in the file by name of each layer whose rounding is to reach them; empty where layers are
            rounded with least error.
        rounding: settings of rounding to the grid.
        compression: "zstd", or None for plain packed bytes in the file.
        scale_dtype: dtype of the layers' scales in the file, "float32" or "bfloat16".
        tensors: parameters to pack that belong to no ordinary Linear or Conv2d layer; their bits are in `bits`, too.
    """

    bits: dict[str, int]
    time_embedding: str
    timesteps: list[float]
    time_path: TimePath | None
    num_timesteps: int = _NUM_TIMESTEPS
    rates: dict[str, float] = field(default_factory=dict)
    rounding: Rounding = Rounding()
    compression: str | None = "zstd"
    scale_dtype: str = "float32"
    tensors: dict[str, TensorPlace] = field(default_factory=dict)
    decided: frozenset[str] = frozenset()

    @property
    def layer_bits(self) -> dict[str, int]:
        """Bits of the ordinary layers alone, by name."""
        return {name: bits for name, bits in self.bits.items() if name not in self.tensors}

    @property
    def replaced_path(self) -> TimePath | None:
        """Time path that a look-up of its features replaces; None where it is kept."""
        return None if self.time_embedding == "keep" else self.time_path

    def schema(self, model: nn.Module) -> CheckpointSchema:
        """Return the schema of the checkpoint.

        Args:
            model: model with its float layers, which may be on the meta device.
        """
        layers = {name: self._layer(model, name, bits) for name, bits in self.bits.items()}
        time = self._time_features()
        return CheckpointSchema(
            layers=layers,
            format_version=format_version_of(layers, time),
            time_features=time,
            balance=self.rounding.balance,
            compression=self.compression,
        )

    def _layer(self, model: nn.Module, name: str, bits: int) -> LayerSchema:
        if (tensor := self.tensors.get(name)) is not None:
            return tensor.schema(bits, self.scale_dtype)
        return LayerSchema(bits, _shape(model, name), scale_dtype=self.scale_dtype)

    def _time_features(self) -> TimeFeaturesSchema:
        path = self.replaced_path
        if path is None:
            return TimeFeaturesSchema()
        cached = self.time_embedding == "cache"
        return TimeFeaturesSchema(
            kind=self.time_embedding,
            features=tuple(path.sizes),
            removed_weights=path.num_weights,
            removed_parameters=path.num_parameters,
            timesteps=tuple(self.timesteps) if cached else (),
            num_timesteps=0 if cached else self.num_timesteps,
            embedding_width=0 if cached else path.embedding_width,
        )


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    layer: Any = model.get_submodule(name)
    return tuple(layer.weight.shape)
