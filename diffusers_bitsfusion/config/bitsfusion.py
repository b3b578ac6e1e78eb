"""`BitsFusionConfig`: the config that a user requests, and after quantizing the config of the checkpoint."""

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
from ..codec.schema import CheckpointSchema, check_compression, check_scale_dtype
from ..codec.time_schema import TIME_FEATURES, check_time_features
from ..ops.dispatch import check_settings
from ..utils.errors import UnfinishedSaveError, printable, shown
from ..utils.json_files import is_count, is_number
from .calibration import Calibration
from .keywords import what_to_write
from .recipe import Recipe

logger = logging.get_logger(__name__)

# Values of `budget`.
BUDGETS = ("file", "memory")
# Values of `time_embedding` that are not mappings.
TIME_EMBEDDINGS = ("auto", *TIME_FEATURES)
# Names of a pipeline's components that are quantized by default; a pipeline has one of them.
DEFAULT_COMPONENTS = ("unet", "transformer")


# Key of the folder that is being saved into, in the config of an unfinished save.
_UNFINISHED = "unfinished_save"


class BitsFusionMethod(str, Enum):  # noqa: UP042 - as the QuantizationMethod of diffusers
    """The name of this method in a checkpoint's `quant_method`; diffusers reads `.value`."""

    BITSFUSION = "bitsfusion"


class BitsFusionConfig(PipelineQuantizationConfig, QuantizationConfigMixin, TransformersConfigMixin):
    """Config of quantization to mixed precision of about 2 bits a weight, for a diffusers model or a whole pipeline.

    Args:
        recipe: bits per layer. "auto" is the published recipe for models of the Stable Diffusion v1.5 shape, and
            data-free allocation to `target_bits` for others. Else a `Recipe`, a mapping of layer name to bits, the
            path or Hub id of a recipe, or an int for the same bits everywhere.
        target_bits: average bits a weight that allocation aims at, by the paper's formula (section 5): log2(levels) of
            every layer plus 16 bits for each time feature of 50 steps, over all Linear and Conv2d weights of the
            original model.
        scale_init: "alternating" (paper, section 3.2) or "minmax".
        scale_iterations: number of rounds of the alternation.
        balance: whether grids have 2**n + 1 symmetric levels (paper, section 3.1); `False` for the plain grid of 2**n.
        in_out_bits: bits of the first and last layer, and of the time embedding where it is kept.
        time_embedding: "table" stores features of all training timesteps, for any scheduler. "cache" stores features
            of the 50 timesteps of the paper's sampling only, or of `{"type": "cache", "timesteps": [...]}`. "keep"
            quantizes the layers of the time embedding. "auto" is the smaller of "table" and "keep" where a table is
            possible.
        modules_to_not_convert: names (or dotted parts of names) of modules that stay as they are; they do not count
            for `target_bits`.
        compute: "exact" decodes a layer's weight for each call and leaves the rest to torch; "int8" rounds activations
            to 8 bits and multiplies in integers; "auto" is exact. `set_compute` changes it later. A saved model does
            not record it: it loads with "auto".
        resident: form of the weights in memory: "packed" for codes and scales; "int8", with `compute="int8"`, for a
            byte a weight beside them. A saved model does not record it either.
        calibration: a `Calibration`, a dict of its values, or `True` for its defaults: `quantize_model` runs the
            pipeline on prompts and rounds for the inputs of its layers. `None` rounds weights without regard to
            inputs. In a quantized checkpoint, a summary of the calibration that was run.
        compression: "zstd", or `None` for plain packed bytes in the file.
        target_bytes: bytes that the model is to take, in place of `target_bits`. The recipe then says only how
            sensitive layers are relative to each other. `None` for no such target.
        budget: what `target_bytes` counts: "file", the model's weight files, for which layers get wide grids whose
            codes are cheap to code, rounded by error and bits; or "memory", the loaded model, for which they get the
            widths that fit.
        scale_dtype: dtype of the scales in the file, "float32" or "bfloat16", to which they are rounded. When left
            out, "bfloat16" for a `target_bytes` of the file, of which small models would else spend much on scales.
        components: names of the pipeline's components to quantize, text encoders (of transformers) among them.
        embeddings: whether tables of embeddings of diffusers' models are packed, too.
        format_version: version of the checkpoint's format; set by quantizing.
        layers: bits and weight shape of every packed layer, and the rank of its branch where LoRAs were fused into it;
            set by quantizing and saving.

    Raises:
        TypeError: an argument that there is not; the message says what to write instead.
        ValueError: a value is impossible; the message names the argument.
    """

    quant_method = BitsFusionMethod.BITSFUSION

    # Attribute of a `PipelineQuantizationConfig` that diffusers' pipeline loader reads; `_resolve_quant_config`
    # decides which components are quantized.
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
        embeddings: bool = False,
        target_bytes: int | None = None,
        budget: str = "file",
        scale_dtype: str | None = None,
        format_version: int | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(
                f"BitsFusionConfig got unexpected keyword arguments: {', '.join(unknown)}. "
                f"{what_to_write(unknown, self._arguments())}"
            )
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
        # The config of a checkpoint has a summary, which does not suffice to run the calibration again.
        self.calibration = Calibration.of(calibration) if format_version is None else calibration
        self.compression = check_compression(compression)
        self.components = _as_names(components, "components")
        self.embeddings = embeddings
        self.target_bytes = target_bytes
        self.budget = budget
        self._schema: CheckpointSchema | None = None
        self._scale_dtype = scale_dtype
        self._check()
        if format_version is not None:
            described = {
                "format_version": format_version,
                "layers": layers,
                "time_embedding": self.time_embedding,
                "balance": balance,
                "compression": compression,
            }
            self._schema = CheckpointSchema.from_json(described)

    @classmethod
    def of(cls, value: Any) -> BitsFusionConfig:
        """Return the config that a user's `config=` means, the defaults where it is None.

        Raises:
            TypeError: the value is no config.
        """
        if value is None or isinstance(value, cls):
            return value or cls()
        arguments = "**config" if isinstance(value, Mapping) else f"recipe={shown(value)}"
        raise TypeError(f"config must be a BitsFusionConfig, got {shown(value)}. Write BitsFusionConfig({arguments}).")

    @classmethod
    def _arguments(cls) -> list[str]:
        return [name for name in inspect.signature(cls).parameters if name != "unknown"]

    def _check(self) -> None:
        if isinstance(self.target_bits, bool) or not isinstance(self.target_bits, (int, float)):
            raise ValueError(f"target_bits must be a number, got {self.target_bits!r}")
        if not (is_number(self.target_bits) and self.target_bits > 0):
            raise ValueError(f"target_bits must be positive, got {shown(self.target_bits)}")
        if not isinstance(self.embeddings, bool):
            raise ValueError(f"embeddings must be True or False, got {self.embeddings!r}")
        if self.target_bytes is not None and not (is_count(self.target_bytes) and self.target_bytes):
            raise ValueError(f"target_bytes must be a positive integer, got {shown(self.target_bytes)}")
        if self.budget not in BUDGETS:
            raise ValueError(f"budget must be one of {BUDGETS}, got {shown(self.budget)}")
        if self.target_bytes is not None and not self.balance:
            raise ValueError("target_bytes needs balanced grids; leave balance True.")
        if self._scale_dtype is not None:
            check_scale_dtype(self._scale_dtype)
        Rounding(self.scale_init, self.scale_iterations, self.balance)  # The constructor checks its arguments.
        check_settings(self.compute, self.resident)
        if isinstance(self.time_embedding, dict):
            check_time_features(self.time_embedding)
        elif self.time_embedding not in TIME_EMBEDDINGS:
            raise ValueError(f"time_embedding must be one of {TIME_EMBEDDINGS} or a dict, got {self.time_embedding!r}")

    @property
    def scale_dtype(self) -> str:
        """Dtype of the scales in the file, "float32" or "bfloat16"; of a checkpoint what its layers have."""
        if self._schema is not None:
            return next(iter(self._schema.layers.values())).scale_dtype
        counts_file = self.target_bytes is not None and self.budget == "file"
        return self._scale_dtype or ("bfloat16" if counts_file else "float32")

    @property
    def rounding(self) -> Rounding:
        """Settings of rounding to the grid."""
        return Rounding(self.scale_init, self.scale_iterations, self.balance)

    def resolved(self, schema: CheckpointSchema, calibration: Mapping[str, Any] | None = None) -> BitsFusionConfig:
        """Return the config of the checkpoint that quantizing by this config results in.

        Args:
            schema: schema of the checkpoint.
            calibration: summary of the calibration that was run, see `Calibration.summary`.
        """
        config = copy.deepcopy(self)
        config.calibration = calibration
        config.schema = schema
        return config

    @property
    def components_to_quantize(self) -> list[str] | None:
        """Components whose absence in a pipeline diffusers warns of; None for the defaults, which are alternatives."""
        return None if self.components == list(DEFAULT_COMPONENTS) else self.components

    @property
    def is_resolved(self) -> bool:
        """True for the config of a quantized checkpoint, False for a requested one."""
        return self._schema is not None

    @property
    def schema(self) -> CheckpointSchema:
        """Schema of the checkpoint.

        Raises:
            ValueError: this is a requested config, where a checkpoint's own was expected.
        """
        if self._schema is None:
            raise ValueError("The checkpoint's quantization_config has no format_version: its config.json is damaged.")
        return self._schema

    @schema.setter
    def schema(self, schema: CheckpointSchema) -> None:
        self._schema = schema
        self.time_embedding = schema.time_features.to_json()

    @property
    def format_version(self) -> int | None:
        """Version of the checkpoint's format; None for a requested config."""
        return None if self._schema is None else self._schema.format_version

    @property
    def layers(self) -> dict[str, dict[str, Any]] | None:
        """Bits, weight shape and branch rank of every packed layer, as in config.json; None for a requested config."""
        return None if self._schema is None else self._schema.to_json()["layers"]

    def _resolve_quant_config(self, is_diffusers: bool = True, module_name: str | None = None) -> Any:
        """Return this config for a component that it names, None for others; diffusers' pipeline loader calls it."""
        return self if module_name in self.components else None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return the config of a dictionary that `to_dict` has returned.

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
        arguments = cls._arguments()
        unknown = sorted(printable(name) for name in set(known) - set(arguments))
        if unknown and known.get("format_version") is None:
            values = {key: value for key, value in known.items() if key not in arguments}
            raise ValueError(
                f"Unknown keys in the BitsFusion quantization config: {', '.join(unknown)}. "
                f"{what_to_write(values, arguments)}"
            )
        if unknown:  # docs/FORMAT.md allows later writers of the same version to add keys.
            logger.warning("Ignoring unknown keys of the checkpoint's quantization_config: %s.", ", ".join(unknown))
            known = {key: value for key, value in known.items() if key in arguments}
        return super().from_dict(known, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a JSON-safe dictionary, which `from_dict` reads."""
        content = {name: copy.deepcopy(getattr(self, name)) for name in self._arguments()}
        if isinstance(self.recipe, Recipe):
            content["recipe"] = dict(self.recipe)
        # Readers of earlier versions do not know these keys, which say nothing where they are left at their defaults.
        if self.target_bytes is None:
            del content["target_bytes"], content["budget"]
        if not self.embeddings:
            del content["embeddings"]
        if self._scale_dtype is None:
            del content["scale_dtype"]
        if self.is_resolved:  # Kernels and paths of one machine do not suit others that load the checkpoint.
            content |= {"compute": "auto", "resident": "packed"}
            if isinstance(self.recipe, str) and os.path.exists(self.recipe):
                content["recipe"] = os.path.basename(os.path.abspath(self.recipe))
        if isinstance(self.calibration, Calibration):
            content["calibration"] = self.calibration.to_dict()
        return {"quant_method": self.quant_method.value, **content}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the values that differ from the defaults, JSON-safe."""
        default = type(self)().to_dict()
        return {key: value for key, value in self.to_dict().items() if value != default.get(key, object())}

    def __repr__(self) -> str:
        text: str = QuantizationConfigMixin.__repr__(self)
        return text


def unfinished_config(config: Mapping[str, Any]) -> str | None:
    """Return the folder of an unfinished save by a model's config, or None where the save has ended."""
    quantization = config.get("quantization_config")
    return quantization.get(_UNFINISHED) if isinstance(quantization, dict) else None


def _as_recipe(recipe: Any) -> Recipe | str | int:
    """Return a recipe as the config stores it: names and paths as text, mappings as `Recipe`."""
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
