"""A plan that fits a number of bytes: of the file, or of the memory that the model then takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from diffusers import ModelMixin

from ..allocation.data_free import GAUSSIAN_ERROR
from ..allocation.file_bytes import GAUSSIAN_ENTROPY, allocate_rates, grid_of_rate
from ..allocation.knapsack import knapsack
from ..codec.checksums import ALGORITHM, METADATA_KEY
from ..codec.entropy import compress
from ..codec.quantize_dense import quantize_to_dense
from ..codec.radix import byte_width, bytes_from_dense, dense_width
from ..codec.schema import CheckpointSchema, LayerSchema
from ..codec.state_dict import encode_state_dict
from ..codec.time_table import packed_rows
from ..config.bitsfusion import BitsFusionConfig
from ..nn.packed_tensor import pack_tensor
from ..nn.time_path import TimePath
from ..utils.private_names import DIFFUSERS_FP32
from .plan import Plan
from .planning import TABLE_BITS_PER_FEATURE, make_plan
from .time_lookup import make_lookup

# Name, shape and bytes of a tensor.
TensorSize = tuple[str, tuple[int, ...], int]

# What zstd makes of the entropy of codes: 1.020 times as many bytes over the trained UNet of examples/shapes.
_CODING_OVERHEAD = 1.02


def make_fitting_plan(
    model: ModelMixin, config: BitsFusionConfig, dtype: torch.dtype, exclude: Iterable[str] = ()
) -> Plan:
    """Return the plan of `planning.make_plan`, its bits changed so that the model takes `config.target_bytes`, if any.

    The bits by the recipe say how sensitive layers are relative to each other. Of the file (`config.budget`) layers
    get bits a weight, `plan.rates`, and grids wide enough for them. Of memory, or of a file that is not entropy coded,
    layers get the widths of least error whose codes fit.

    Args:
        model: unquantized model, which may be on the meta device; the table of time features is then an estimate.
        config: requested config.
        dtype: dtype of what stays in floating point.
        exclude: names of modules that are not quantized, beside those that the config names.

    Raises:
        ValueError: the target cannot be reached; or see `planning.make_plan`.
    """
    plan = make_plan(model, config, exclude)
    if config.target_bytes is None:
        return plan
    in_memory = config.budget == "memory"
    bits = {name: n for name, n in plan.bits.items() if name in plan.decided}
    schemas = plan.schema(model).layers
    sizes = {name: schemas[name].num_weights for name in bits}
    left = config.target_bytes - _other_bytes(plan, model, dtype, in_memory)
    try:
        if in_memory or plan.compression is None:
            width = dense_width if in_memory else byte_width
            cost = {name: [schemas[name].rows * width(schemas[name].columns, n) for n in range(1, 8)] for name in bits}
            errors = {name: [sizes[name] * 4.0**n * error for error in GAUSSIAN_ERROR] for name, n in bits.items()}
            plan.bits |= knapsack(errors, cost, left)
        else:
            plan.rates = allocate_rates(bits, sizes, 8 * left)
            plan.bits |= {name: grid_of_rate(rate) for name, rate in plan.rates.items()}
    except ValueError as error:
        other = config.target_bytes - left
        raise ValueError(
            f"target_bytes={config.target_bytes} cannot be reached for this model: {error}. All but the codes of the "
            f"layers that a recipe decides takes {other} bytes."
        ) from error
    return plan


def codes_rate(plan: Plan, model: ModelMixin, dtype: torch.dtype, target_bytes: int) -> float:
    """Return the entropy that the codes of all layers may have in a file of a size, in bits a weight.

    Args:
        plan: plan of the model.
        model: unquantized model.
        dtype: dtype of what stays in floating point.
        target_bytes: bytes of the file.

    Raises:
        ValueError: the file takes as many bytes without the codes.
    """
    layers = plan.schema(model).layers
    other = _other_bytes(replace(plan, decided=frozenset(layers)), model, dtype, in_memory=False)
    if other >= target_bytes:
        raise ValueError(
            f"target_bytes={target_bytes} cannot be reached for this model: all but the codes takes {other} bytes."
        )
    weights = sum(layer.num_weights for layer in layers.values())
    return 8 * (target_bytes - other) / (_CODING_OVERHEAD * weights)


def _other_bytes(plan: Plan, model: ModelMixin, dtype: torch.dtype, in_memory: bool) -> int:
    """Return the bytes of everything but the codes of the layers that a recipe decides."""
    tensors = list(_codes_and_scales(plan, model, in_memory))
    tensors += time_tensors(plan, in_memory)
    tensors += float_tensors(model, plan, dtype)
    total = sum(size for _, _, size in tensors)
    return total if in_memory else total + header_bytes(tensors)


def _codes_and_scales(plan: Plan, model: ModelMixin, in_memory: bool) -> Iterator[TensorSize]:
    for name, layer in plan.schema(model).layers.items():
        codes = 0
        if name not in plan.decided and in_memory:
            codes = layer.rows * dense_width(layer.columns, layer.bits)
        elif name not in plan.decided and plan.compression is None:
            codes = layer.rows * byte_width(layer.columns, layer.bits)
        elif name not in plan.decided:
            codes = _frame_bytes(plan, model, name, layer)
        yield f"{name}.codes", (layer.num_weights,), codes
        yield f"{name}.scale", (layer.rows,), layer.rows * (4 if in_memory else layer.scale_bytes)


def _frame_bytes(plan: Plan, model: ModelMixin, name: str, layer: LayerSchema) -> int:
    """Return the bytes of a layer's codes in the file; those of Gaussian weights where its own are not there."""
    place = plan.tensors.get(name)
    weight = model.get_parameter(f"{name}.weight" if place is None else place.full_parameter).detach()
    if weight.is_meta:
        return round(layer.num_weights * GAUSSIAN_ENTROPY[layer.bits - 1] / 8)
    if place is None:
        codes, _ = quantize_to_dense(weight.flatten(1), layer.bits, plan.rounding)
    else:
        codes = pack_tensor(layer, weight, weight.dtype, plan.rounding).codes
    return compress(bytes_from_dense(codes.cpu(), layer.bits, layer.columns)).numel()


def time_tensors(plan: Plan, in_memory: bool = False) -> list[TensorSize]:
    """Return the tensors of the look-up of time features, in the file or in memory.

    A table in the file is an estimate where the weights of the time path are on the meta device.
    """
    path = plan.replaced_path
    if path is None:
        return []
    if path.layers["time_embedding.linear_1"].weight.is_meta:
        return _estimated_time_tensors(plan, path, in_memory)
    lookup, time = make_lookup(path, plan.schema(path.model).time_features)
    tensors = {f"time_proj.{name}": tensor for name, tensor in lookup.state_dict().items()}
    if not in_memory:
        tensors = encode_state_dict(tensors, CheckpointSchema({}, time))
    return [(name, tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()]


def _estimated_time_tensors(plan: Plan, path: TimePath, in_memory: bool) -> list[TensorSize]:
    features = sum(size for _, size in path.sizes)
    if plan.time_embedding == "cache":
        steps = len(plan.timesteps)
        return [
            ("time_proj.values", (steps, features), 2 * steps * features),
            ("time_proj.timesteps", (steps,), 4 * steps),
        ]
    rows = plan.num_timesteps + 2
    if in_memory:
        sizes = [packed_rows(rows) * width for width in (features, path.embedding_width)]
    else:
        sizes = [round(width * TABLE_BITS_PER_FEATURE / 8) for width in (features, path.embedding_width)]
    return [
        ("time_proj.codes", (sizes[0],), sizes[0]),
        ("time_proj.scale", (features,), 4 * features),
        ("time_proj.embedding_codes", (sizes[1],), sizes[1]),
        ("time_proj.embedding_scale", (path.embedding_width,), 4 * path.embedding_width),
    ]


def float_tensors(model: ModelMixin, plan: Plan, dtype: torch.dtype) -> Iterator[TensorSize]:
    """Return biases, norms and float layers, without the time path where features replace it.

    Args:
        model: unquantized model, which may be on the meta device.
        plan: plan of the model.
        dtype: dtype of what stays in floating point.
    """
    gone = set() if plan.replaced_path is None else set(plan.replaced_path.layers)
    packed = {f"{name}.weight" for name in plan.layer_bits} | {t.full_parameter for t in plan.tensors.values()}
    kept_in_fp32 = DIFFUSERS_FP32.read(model) or []
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in gone or name in packed:
            continue
        in_fp32 = any(part in name.split(".") for part in kept_in_fp32)
        yield name, tuple(parameter.shape), parameter.numel() * (4 if in_fp32 else dtype.itemsize)


def header_bytes(tensors: Sequence[TensorSize]) -> int:
    """Return the bytes of the header of a file with these tensors, checksums included."""
    texts = {name: {"dtype": "F16", "shape": shape, "data_offsets": [10**8, 10**8]} for name, shape, _ in tensors}
    checksums = json.dumps({"algorithm": ALGORITHM, "tensors": dict.fromkeys(texts, "0" * 8)})
    header = texts | {"__metadata__": {METADATA_KEY: checksums, "format": "pt"}}
    return len(json.dumps(header, separators=(",", ":")))
