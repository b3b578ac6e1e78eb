"""The size of a packed file before it exists: from a model's config alone, without its weights."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import ModelMixin
from torch.nn.modules.module import register_module_module_registration_hook

from ..codec.entropy import compress
from ..codec.quantize_dense import quantize_to_dense
from ..codec.radix import byte_width, bytes_from_dense
from ..codec.rounding import Rounding
from ..codec.schema import CheckpointSchema
from ..config.bitsfusion import BitsFusionConfig
from ..packing.file_budget import TensorSize, float_tensors, header_bytes, make_fitting_plan, time_tensors
from ..utils.errors import DamagedFileError, shown
from ..utils.json_files import MAX_MODEL_BYTES, is_number, read_json
from ..utils.private_names import DIFFUSERS_FP32
from .report_types import SizeReport, report_of_tensors

# Shape of the sample of weights: a quarter of a 320-channel 3×3 convolution, which gives three digits.
_SAMPLE = (128, 2880)
# Seed of the sample.
_SEED = 0

# Modules of the largest model that is built; a DiT of 100 blocks has some 10,000.
_MAX_MODULES = 100_000
# Largest number of a model's config; vocabularies and positions have the largest ones.
_MAX_NUMBER = 1 << 24


def model_from_config(path: str | Path) -> ModelMixin:
    """Build a diffusers model without weights (on the meta device) from its config.json or that file's folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not the config of a diffusers model.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file: give the config.json of a diffusers model.")
    config = read_json(file, non_finite=True, max_bytes=MAX_MODEL_BYTES)
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise ValueError(f"{file} names no diffusers model (_class_name is {shown(config.get('_class_name'))}).")
    if (size := _largest_number(config)) > _MAX_NUMBER:
        raise DamagedFileError(file, f"holds the number {shown(size)}, which no model has")
    try:
        with torch.device("meta"), _bounding_modules():
            return cast(Any, kind).from_config(config)
    except Exception as error:  # Constructors raise any error for values that they do not check.
        raise DamagedFileError(
            file, f"describes no {kind.__name__} that can be built ({type(error).__name__}: {shown(str(error))})"
        ) from error


def _largest_number(value: Any) -> float:
    """Return the largest absolute value within nested JSON; 0 where there is no finite number."""
    if isinstance(value, (dict, list)):
        return max(map(_largest_number, value.values() if isinstance(value, dict) else value), default=0)
    return abs(value) if is_number(value) else 0


@contextmanager
def _bounding_modules() -> Iterator[None]:
    """Refuse, within this context, to build more modules than any model has, which would take hours."""
    count = itertools.count(1)

    def check(*_: Any) -> None:
        if next(count) > _MAX_MODULES:
            raise ValueError(f"it would have more than {_MAX_MODULES} modules")

    hook = register_module_module_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


def predict_size(
    model: ModelMixin, config: BitsFusionConfig | None = None, dtype: torch.dtype = torch.float16
) -> SizeReport:
    """Predict the size of the packed file of `model`, part by part.

    Packed weights are counted as Gaussian weights take them, measured on a sample by the codec itself; trained ones
    differ by some percent. Time features of all timesteps are an estimate too, where there are no weights to compute
    them from; all else is exact.

    Args:
        model: a diffusers model, maybe on the meta device (see `model_from_config`); not changed.
        config: how it would be quantized; `BitsFusionConfig()` when left out.
        dtype: dtype of what stays in floating point.

    Raises:
        ValueError: see `plan.make_plan`.
    """
    config = BitsFusionConfig.of(config)
    kept_in_fp32 = DIFFUSERS_FP32.read(model) or []
    plan = make_fitting_plan(model, config, dtype, kept_in_fp32)
    schema = plan.schema(model)
    tensors = [*_packed(schema, plan.rates), *time_tensors(plan), *float_tensors(model, plan, dtype)]
    content = dict(model.config) | {"quantization_config": config.resolved(schema).to_dict()}
    overhead = header_bytes(tensors) + len(json.dumps(content, indent=2))
    return report_of_tensors("predicted file", tensors, schema, overhead, config.modules_to_not_convert)


def _packed(schema: CheckpointSchema, rates: Mapping[str, float]) -> Iterator[TensorSize]:
    for name, layer in schema.layers.items():
        size = layer.rows * byte_width(layer.columns, layer.bits)
        if name in rates:
            size = round(rates[name] * layer.num_weights / 8)
        elif schema.compression is not None:
            size = round(_compressed_share(layer.bits, schema.balance) * size)
        yield f"{name}.codes", (size,), size
        yield f"{name}.scale", (layer.rows,), layer.rows * layer.scale_bytes


@functools.cache
def _compressed_share(bits: int, balance: bool) -> float:
    """Return the share of the packed bytes of Gaussian weights that zstd leaves."""
    weight = torch.randn(_SAMPLE, generator=torch.Generator().manual_seed(_SEED))
    dense, _ = quantize_to_dense(weight, bits, Rounding(balance=balance))
    packed = bytes_from_dense(dense, bits, _SAMPLE[1])
    return compress(packed).numel() / packed.numel()
