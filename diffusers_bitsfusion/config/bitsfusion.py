"""`BitsFusionConfig`: what the user asks for, and after quantizing what a checkpoint says it is."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from diffusers import PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin

from ..codec.grid import check_bits
from ..codec.rounding import Rounding
from ..codec.schema import TIME_FEATURES, CheckpointSchema, check_compression, check_time_features
from ..ops.dispatch import check_settings
from ..utils.errors import UnfinishedSaveError, printable, shown
from ..utils.json_files import is_number
from .calibration import Calibration
from .recipe import Recipe

logger = logging.get_logger(__name__)

TIME_EMBEDDINGS = ("auto", *TIME_FEATURES)
DEFAULT_COMPONENTS = ("unet", "transformer")


# In the config of a save under way: the folder that is saved into.
_UNFINISHED = "unfinished_save"


class BitsFusionMethod(str, Enum):
    """The name of this method in a checkpoint's `quant_method`; diffusers reads `.value`."""

    BITSFUSION = "bitsfusion"


class BitsFusionConfig(PipelineQuantizationConfig, QuantizationConfigMixin, TransformersConfigMixin):
    """Quantization to mixed precision of about 2 bits a weight, for a diffusers model or a whole pipeline.

    Args:
        recipe: bits per layer. "auto": the published recipe for models of the Stable Diffusion v1.5 shape, data-free
            allocation to `target_bits` for others. Or a `Recipe`, a mapping of layer name to bits, a path or Hub id
            of one, or an int for the same bits everywhere.
        target_bits: average bits a weight that allocation aims at, by the paper's formula: log2(levels) of every
            layer plus 16 bits for each time feature of 50 steps, over all Linear and Conv2d weights of the original.
        scale_init: "alternating" (paper, section 3.2) or "minmax".
        scale_iterations: rounds of the alternation.
        balance: 2**n + 1 symmetric levels (paper, section 3.1); `False` for the plain grid of 2**n.
        in_out_bits: bits of the first and last layer, and of the time embedding where it is kept.
        time_embedding: "table": features of all training timesteps, for any scheduler; "cache": features of the
            50 timesteps of the paper's sampling only, or of `{"type": "cache", "timesteps": [...]}`; "keep": the time
            embedding stays, as quantized layers; "auto": the smaller of "table" and "keep" where a table is possible.
        modules_to_not_convert: names (or dotted parts of names) of modules to leave as they are; they do not count for
            `target_bits`.
        compute: "exact" decodes a layer's weight for each call and leaves the rest to torch; "int8" rounds activations
            to 8 bits and multiplies in integers; "auto" takes exact. See `set_compute`, which changes it later. A
            saved model does not record it: it loads with "auto".
        resident: what stays in memory: "packed", codes and scales; "int8", with `compute="int8"`, a byte a weight
            beside them. Not recorded either.
        calibration: a `Calibration`, a dict of its values, or `True` for its defaults: `quantize_model` runs the
            pipeline on prompts and rounds for the inputs that its layers see. `None`: weights are rounded without
            looking at inputs. In a quantized checkpoint, what was run.
        compression: "zstd", or `None` for plain packed bytes in the file.
        components: names of the pipeline's components to quantize, text encoders (of transformers) among them.
        format_version: set by quantizing; the layout of the checkpoint.
        layers: set by quantizing and saving; bits and weight shape of every packed layer, and the rank of its branch
            where LoRAs were fused into it.

    Raises:
        ValueError: a value is impossible; the message names the argument.
    """

    quant_method = BitsFusionMethod.BITSFUSION

    # What diffusers' pipeline loader reads of a `PipelineQuantizationConfig`; which components we take is decided in
    # `_resolve_quant_config`.
    quant_mapping = None

    def __init__(
        self,
        recipe: str | os.PathLike[str] | int | Mapping[str, int] = "auto",
        target_bits: float = 1.99,
        scale_init: str = "alternating",
        scale_iterations: int = 10,
        balance: bool = True,
        in_out_bits: int = 8,
        time_embedding: str | Mapping[str, Any] = "auto",
        modules_to_not_convert: Sequence[str] | None = None,
        compute: str = "auto",
        resident: str = "packed",
        calibration: Calibration | Mapping[str, Any] | bool | None = None,
        compression: str | None = "zstd",
        components: Sequence[str] = DEFAULT_COMPONENTS,
        format_version: int | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self.recipe = _as_recipe(recipe)
        self.target_bits = target_bits
        self.scale_init = scale_init
        self.scale_iterations = scale_iterations
        self.balance = balance
        self.in_out_bits = check_bits(in_out_bits, "in_out_bits")
        self.time_embedding = dict(time_embedding) if isinstance(time_embedding, Mapping) else time_embedding
        self.modules_to_not_convert = _as_names(modules_to_not_convert or [], "modules_to_not_convert")
        self.compute = compute
        self.resident = resident
        # A checkpoint says what was run, which is less than what is needed to run it again.
        self.calibration = Calibration.of(calibration) if format_version is None else calibration
        self.compression = check_compression(compression)
        self.components = _as_names(components, "components")
        self._check()
        self._schema: CheckpointSchema | None = None
        if format_version is not None:
            described = {
                "format_version": format_version,
                "layers": layers,
                "time_embedding": self.time_embedding,
                "balance": balance,
                "compression": compression,
            }
            self._schema = CheckpointSchema.from_json(described)

    def _check(self) -> None:
        if isinstance(self.target_bits, bool) or not isinstance(self.target_bits, (int, float)):
            raise ValueError(f"target_bits must be a number, got {self.target_bits!r}")
        if not (is_number(self.target_bits) and self.target_bits > 0):
            raise ValueError(f"target_bits must be positive, got {shown(self.target_bits)}")
        Rounding(self.scale_init, self.scale_iterations, self.balance)  # it checks them
        check_settings(self.compute, self.resident)
        if isinstance(self.time_embedding, dict):
            check_time_features(self.time_embedding)
        elif self.time_embedding not in TIME_EMBEDDINGS:
            raise ValueError(f"time_embedding must be one of {TIME_EMBEDDINGS} or a dict, got {self.time_embedding!r}")

    @property
    def rounding(self) -> Rounding:
        """How weights are rounded to their grid."""
        return Rounding(self.scale_init, self.scale_iterations, self.balance)

    def resolved(self, schema: CheckpointSchema, calibration: Mapping[str, Any] | None = None) -> BitsFusionConfig:
        """Return the config of the checkpoint that quantizing by this one gives.

        Args:
            schema: what the checkpoint holds.
            calibration: what was run, see `Calibration.summary`.
        """
        config = copy.deepcopy(self)
        config.calibration = calibration
        config.time_embedding = schema.time_features.to_json()
        config.schema = schema
        return config

    @property
    def components_to_quantize(self) -> list[str] | None:
        """Components that diffusers warns of when the pipeline lacks them; the defaults are alternatives."""
        return None if self.components == list(DEFAULT_COMPONENTS) else self.components

    @property
    def is_resolved(self) -> bool:
        """Whether this describes a quantized checkpoint rather than a wish."""
        return self._schema is not None

    @property
    def schema(self) -> CheckpointSchema:
        """What the checkpoint holds.

        Raises:
            ValueError: this is a wish, where a checkpoint's own config was expected.
        """
        if self._schema is None:
            raise ValueError("The checkpoint's quantization_config has no format_version: its config.json is damaged.")
        return self._schema

    @schema.setter
    def schema(self, schema: CheckpointSchema) -> None:
        self._schema = schema

    @property
    def format_version(self) -> int | None:
        """Version of the checkpoint's layout; None of a wish."""
        return None if self._schema is None else self._schema.format_version

    @property
    def layers(self) -> dict[str, dict[str, Any]] | None:
        """Bits, weight shape and branch rank of every packed layer, as config.json has them; None of a wish."""
        return None if self._schema is None else self._schema.to_json()["layers"]

    def _resolve_quant_config(self, is_diffusers: bool = True, module_name: str | None = None) -> Any:
        """This config for the pipeline components it names, None for others (called by diffusers' loader)."""
        return self if module_name in self.components else None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of `to_dict`.

        Raises:
            ValueError: an unknown key, or a checkpoint of a newer format version.
            UnfinishedSaveError: the save of the checkpoint was killed before its end.
        """
        if (folder := config_dict.get(_UNFINISHED)) is not None:
            raise UnfinishedSaveError(
                f"A save into {shown(folder)[1:-1]} was cut off. Finish it by `bitsfusion inspect {shown(folder)} "
                "--repair`, or save again."
            )
        known = {key: value for key, value in config_dict.items() if key != "quant_method"}
        arguments = inspect.signature(cls).parameters
        unknown = sorted(printable(name) for name in set(known) - set(arguments))
        if unknown and known.get("format_version") is None:
            raise ValueError(
                f"Unknown keys in the BitsFusion quantization config: {', '.join(unknown)}. Known are: "
                f"{', '.join(arguments)}."
            )
        if unknown:  # docs/FORMAT.md allows them to later writers of the same version
            logger.warning("Ignoring unknown keys of the checkpoint's quantization_config: %s.", ", ".join(unknown))
            known = {key: value for key, value in known.items() if key in arguments}
        return super().from_dict(known, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe content; `from_dict` reads it."""
        content = {name: copy.deepcopy(getattr(self, name)) for name in inspect.signature(type(self)).parameters}
        if isinstance(self.recipe, Recipe):
            content["recipe"] = dict(self.recipe)
        if self.is_resolved:  # how one machine computes, and where it keeps its files, is not for the others that load
            content |= {"compute": "auto", "resident": "packed"}
            if isinstance(self.recipe, str) and os.path.exists(self.recipe):
                content["recipe"] = os.path.basename(os.path.abspath(self.recipe))
        if isinstance(self.calibration, Calibration):
            content["calibration"] = self.calibration.to_dict()
        return {"quant_method": self.quant_method.value, **content}

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults."""
        default = type(self)().to_dict()
        return {key: value for key, value in self.to_dict().items() if value != default.get(key, object())}

    def __repr__(self) -> str:
        return QuantizationConfigMixin.__repr__(self)


def unfinished_config(config: Mapping[str, Any]) -> str | None:
    """The folder that was being saved into, where a model's config says that the save has not ended."""
    quantization = config.get("quantization_config")
    return quantization.get(_UNFINISHED) if isinstance(quantization, dict) else None


def _as_recipe(recipe: Any) -> Recipe | str | int:
    """A recipe as the config keeps it: names and paths as text, mappings as `Recipe`."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe(recipe)
    if isinstance(recipe, (str, os.PathLike)):
        return os.fspath(recipe)
    return check_bits(recipe, "recipe as an int")


def _as_names(names: Any, argument: str) -> list[str]:
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{argument} must be a list of names, got {names!r}")
    return list(names)
