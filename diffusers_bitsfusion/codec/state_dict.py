"""The file's tensors and the model's (docs/FORMAT.md): state dict to state dict, with every check on the way in."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from ..native.library import native_library
from ..utils.peft_names import split_adapters
from .entropy import check_frame, compress, decompress
from .low_rank_table import LowRankTable, decode_basis, decode_coefficients, encode_basis, encode_coefficients
from .radix import byte_width, bytes_from_dense, largest_byte
from .repack import repack
from .schema import CheckpointSchema, LayerSchema, branch_shapes
from .time_schema import TimeFeaturesSchema
from .time_table import (
    decode_table,
    dequantize_table,
    encode_table,
    from_table_bytes,
    pack_table,
    quantize_table,
    table_bytes,
    unpack_rows,
)
from .values import check_values

# Names in a table of low rank: functions of time, and each feature's shares of them.
_BASIS, _COEFFICIENTS = "time_proj.basis", "time_proj.coefficients"

# Name in a cache: features in 16 bits. In memory these tensors of 16 bits are bytes, see `table_bytes`.
_VALUES = "time_proj.values"


def encode_state_dict(state_dict: Mapping[str, Tensor], schema: CheckpointSchema) -> dict[str, Tensor]:
    """Encode the tensors of a quantized model as tensors of the file.

    Args:
        state_dict: tensors by name; packed layers have `codes` in the dense form. PEFT's adapters are left out.
        schema: what the checkpoint holds.

    Raises:
        ValueError: packed layers of the schema were replaced by others, or removed.
    """
    encoded, _ = split_adapters(state_dict)
    gone = [name for name in schema.layers if f"{name}.codes" not in encoded]
    if gone:
        names = ", ".join(gone[:5]) + (f" and {len(gone) - 5} more" if len(gone) > 5 else "")
        raise ValueError(
            f"Cannot save the model: its packed layers {names} were replaced or removed since it was quantized. "
            "Change layers of the model in full precision (after `dequantize()`), then quantize it again."
        )
    time = schema.time_features
    if time.rank:
        encoded[_BASIS] = encode_basis(encoded[_BASIS].cpu().view(torch.int16))
        encoded[_COEFFICIENTS] = encode_coefficients(encoded[_COEFFICIENTS].cpu().view(torch.int16))
        encoded["time_proj.scale"] = encoded["time_proj.scale"][_first_columns(time)]
    elif time.kind == "table":
        if _BASIS in encoded:
            _expand(encoded, time)
        rows = torch.arange(time.num_timesteps + 2)
        for key, columns in _tables(time).items():
            encoded[key] = unpack_rows(from_table_bytes(encoded[key].cpu(), columns), rows).to(torch.int16)
        _fold_time_branches(encoded, time)
    elif time.kind == "cache":
        encoded[_VALUES] = encoded[_VALUES].view(torch.int16)
    for name, layer in schema.layers.items():
        key = f"{name}.codes"
        packed = bytes_from_dense(encoded[key].cpu(), layer.bits, layer.columns)
        encoded[key] = compress(packed) if schema.compression == "zstd" else packed
    for key in _float_bits(schema):
        encoded[key] = encoded[key].view(-1)
    _shorten_scales(encoded, schema)
    for key in _tables(time):
        encoded[key] = encode_table(encoded[key].cpu())
    return encoded


def _expand(state_dict: dict[str, Tensor], time: TimeFeaturesSchema) -> None:
    """Replace a table of low rank by one of each feature's codes, in the form in memory."""
    basis, coefficients = (state_dict.pop(key).cpu().view(torch.int16) for key in (_BASIS, _COEFFICIENTS))
    basis_scale, scale = (
        state_dict.pop(f"time_proj.{name}").cpu().view(torch.float32).view(-1) for name in ("basis_scale", "scale")
    )
    codes, scale = quantize_table(LowRankTable(basis, basis_scale, coefficients, scale).dense())
    parts = {"codes": slice(time.num_features), "embedding_codes": slice(time.num_features, None)}
    for name, part in parts.items():
        state_dict[f"time_proj.{name}"] = table_bytes(pack_table(codes[:, part]))
        state_dict[f"time_proj.{name.replace('codes', 'scale')}"] = scale[part].contiguous().view(torch.int32)


def _fold_time_branches(state_dict: dict[str, Tensor], time: TimeFeaturesSchema) -> None:
    """Fold the branches of time projections, from fused LoRAs, into the table of time features.

    So the file needs no place for them; the features are rounded once more.
    """
    branches = {name.rpartition(".")[0] for name in state_dict if name.endswith(".time_emb_proj.branch_down")}
    if not branches:
        return
    codes = state_dict["time_proj.codes"]
    bits = state_dict["time_proj.scale"] = state_dict["time_proj.scale"].cpu().clone()
    scale = bits.view(-1).view(torch.float32)
    embedding = dequantize_table(
        state_dict["time_proj.embedding_codes"].cpu(),
        state_dict["time_proj.embedding_scale"].cpu().view(-1).view(torch.float32),
    )
    embedding = F.silu(embedding)
    stop = 0
    for block, size in time.features:
        part = slice(stop, stop := stop + size)
        name = f"{block}.time_emb_proj"
        if name in branches:
            down, up = (state_dict.pop(f"{name}.branch_{half}").cpu().float() for half in ("down", "up"))
            added = embedding @ down.T @ up.T
            codes[:, part], scale[part] = quantize_table(dequantize_table(codes[:, part], scale[part]) + added)


def decode_state_dict(state_dict: Mapping[str, Tensor], schema: CheckpointSchema) -> dict[str, Tensor]:
    """Decode what `encode_state_dict` encoded, for all of a file or one shard of it.

    Tensors that are the bits of floats have one dimension in the file and two in memory, see `nn.packed.float_bits`.

    Raises:
        ValueError: a tensor is damaged or of the wrong dtype or shape; the message names it.
    """
    decoded = dict(state_dict)

    def decode_codes(name: str) -> tuple[str, Tensor]:
        key = f"{name}.codes"
        return key, _decode_codes(key, state_dict[key], schema.layers[name], schema.compression)

    _check_plain(state_dict, schema)
    # Decompressing and the compiled loops release the interpreter's lock.
    threads = torch.get_num_threads() if native_library() else 1
    with ThreadPoolExecutor(threads) as pool:
        decoded.update(pool.map(decode_codes, [name for name in schema.layers if f"{name}.codes" in state_dict]))
    _decode_time_table(decoded, schema.time_features)
    _lengthen_scales(decoded, schema)
    for key in _float_bits(schema) & decoded.keys():
        decoded[key] = decoded[key].view(-1, 1)
    return decoded


def check_encoded(state_dict: Mapping[str, Tensor], schema: CheckpointSchema) -> None:
    """Check tensors of a file as `decode_state_dict` does, without the memory of their decoded form.

    Raises:
        ValueError: see `decode_state_dict`.
    """
    _check_plain(state_dict, schema)
    for name, layer in schema.layers.items():
        key, shape = f"{name}.codes", (layer.rows, byte_width(layer.columns, layer.bits))
        if key in state_dict and schema.compression is None:
            _check_bytes(key, _packed_bytes(key, state_dict[key], shape, None), layer.bits)
        elif key in state_dict:
            _check_frame(key, state_dict[key], shape[0] * shape[1], largest_byte(layer.bits))
    for key, codes in _coded_numbers(schema.time_features).items():
        if key in state_dict:
            _check_frame(key, state_dict[key], 2 * codes)


def _check_plain(state_dict: Mapping[str, Tensor], schema: CheckpointSchema) -> None:
    """Check all but what is compressed."""
    for name, layer in schema.layers.items():
        dtype = torch.int32 if layer.scale_bytes == 4 else torch.int16
        _check(state_dict, f"{name}.scale", dtype, (layer.rows,))
        _check_branch(state_dict, name, layer)
    _check_time_features(state_dict, schema.time_features)
    check_values(state_dict, schema)


def _check_frame(key: str, tensor: Tensor, size: int, largest: int = 255) -> None:
    try:
        check_frame(_frame(key, tensor), size, largest)
    except ValueError as error:
        raise ValueError(f"{key} {error}.") from error


def _float_bits(schema: CheckpointSchema) -> set[str]:
    """Return the names of the tensors that are the bits of fp32 values."""
    scales = {f"{name}.scale" for name in schema.layers}
    time = schema.time_features
    scales |= {key.replace("codes", "scale") for key in _tables(time)}
    scales |= {"time_proj.basis_scale", "time_proj.scale"} if time.rank else set()
    return scales | ({"time_proj.timesteps"} if time.kind == "cache" else set())


def _shorten_scales(encoded: dict[str, Tensor], schema: CheckpointSchema) -> None:
    """Replace scales of layers that are rounded to bfloat16, the bits of fp32 in memory, by the bits of bfloat16."""
    for name, layer in schema.layers.items():
        if layer.scale_dtype == "bfloat16":
            key = f"{name}.scale"
            encoded[key] = encoded[key].view(torch.float32).to(torch.bfloat16).view(torch.int16)


def _lengthen_scales(decoded: dict[str, Tensor], schema: CheckpointSchema) -> None:
    for name, layer in schema.layers.items():
        key = f"{name}.scale"
        if layer.scale_dtype == "bfloat16" and key in decoded:
            decoded[key] = decoded[key].view(torch.bfloat16).float().view(torch.int32)


def _tables(time: TimeFeaturesSchema) -> dict[str, int]:
    """Return the number of columns of the tables of each feature's codes, by their names."""
    if time.rank:
        return {}
    tables = {"time_proj.codes": time.num_features, "time_proj.embedding_codes": time.embedding_width}
    return {key: columns for key, columns in tables.items() if time.kind == "table" and columns}


def _coded_numbers(time: TimeFeaturesSchema) -> dict[str, int]:
    """Return the number of 16-bit codes in each frame of time features, by its name."""
    rows = time.num_timesteps + 2
    if time.rank:
        return {_BASIS: rows * time.rank, _COEFFICIENTS: time.rank * time.num_columns}
    return {key: rows * columns for key, columns in _tables(time).items()}


def _decode_time_table(decoded: dict[str, Tensor], time: TimeFeaturesSchema) -> None:
    if time.rank:
        _decode_sums(decoded, time)
    if _VALUES in decoded and time.kind == "cache":
        decoded[_VALUES] = decoded[_VALUES].view(torch.uint8)
    for key, columns in _tables(time).items():
        if key not in decoded:
            continue
        frame = _frame(key, decoded[key])
        try:
            codes = decode_table(frame, time.num_timesteps + 2, columns)
        except ValueError as error:
            raise ValueError(f"{key} {error}.") from error
        decoded[key] = table_bytes(pack_table(codes))


def _decode_sums(decoded: dict[str, Tensor], time: TimeFeaturesSchema) -> None:
    """Decode what is there of a table of low rank."""
    sums = {
        _BASIS: (decode_basis, time.num_timesteps + 2, time.rank),
        _COEFFICIENTS: (decode_coefficients, time.rank, time.num_columns),
    }
    for key, (decode, *shape) in sums.items():
        if key in decoded:
            try:
                decoded[key] = decode(_frame(key, decoded[key]), *shape).view(torch.uint8)
            except ValueError as error:
                raise ValueError(f"{key} {error}.") from error
    if "time_proj.scale" in decoded:
        sizes = torch.tensor(time.part_sizes)
        decoded["time_proj.scale"] = decoded["time_proj.scale"].cpu().repeat_interleave(sizes)


def _first_columns(time: TimeFeaturesSchema) -> Tensor:
    """Return the first column of each part of a table of low rank, all of whose columns have one scale."""
    sizes = torch.tensor(time.part_sizes)
    return sizes.cumsum(0) - sizes


def _check_time_features(state_dict: Mapping[str, Tensor], time: TimeFeaturesSchema) -> None:
    if time.kind == "cache":
        _check(state_dict, _VALUES, torch.int16, (len(time.timesteps), time.num_features))
        _check(state_dict, "time_proj.timesteps", torch.int32, (len(time.timesteps),))
    for key, columns in _tables(time).items():
        _check(state_dict, key.replace("codes", "scale"), torch.int32, (columns,))
    if time.rank:
        _check(state_dict, "time_proj.basis_scale", torch.int32, (time.rank,))
        _check(state_dict, "time_proj.scale", torch.int32, (len(time.part_sizes),))


def _decode_codes(key: str, tensor: Tensor, layer: LayerSchema, compression: str | None) -> Tensor:
    rows, columns, bits = layer.rows, layer.columns, layer.bits
    # Frames are moved to the CPU, since transformers reads onto the model's device.
    packed = _packed_bytes(key, tensor.cpu(), (rows, byte_width(columns, bits)), compression)
    _check_bytes(key, packed, bits)
    return repack(packed, bits, columns)


def _check_bytes(key: str, packed: Tensor, bits: int) -> None:
    # numpy's maximum runs on this thread alone, unlike torch's.
    if packed.numel() and packed.numpy().max() > largest_byte(bits):
        raise ValueError(f"{key} is damaged: it holds bytes that {bits}-bit codes never have.")


def _packed_bytes(key: str, tensor: Tensor, shape: tuple[int, int], compression: str | None) -> Tensor:
    if compression is None:
        _check({key: tensor}, key, torch.uint8, shape)
        return tensor
    try:
        return decompress(_frame(key, tensor), shape[0] * shape[1]).view(shape)
    except ValueError as error:
        raise ValueError(f"{key} {error}.") from error


def _frame(key: str, tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(
            f"{key} must be one zstd frame, uint8 of one dimension; it is {tensor.dtype}, {tensor.shape}."
        )
    return tensor.contiguous()


def _check(state_dict: Mapping[str, Tensor], key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = state_dict.get(key)
    if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape):
        raise ValueError(
            f"{key} must be {dtype} of shape {shape}; the checkpoint has {tensor.dtype} of {tuple(tensor.shape)}."
        )


def _check_branch(state_dict: Mapping[str, Tensor], name: str, layer: LayerSchema) -> None:
    for part, shape in zip(("branch_down", "branch_up"), branch_shapes(layer.shape, layer.branch_rank), strict=True):
        tensor = state_dict.get(f"{name}.{part}")
        if tensor is not None and (not tensor.is_floating_point() or tuple(tensor.shape) != shape):
            raise ValueError(
                f"{name}.{part} must be floating of shape {shape}, for branch_rank {layer.branch_rank} in "
                f"config.json; the checkpoint has {tensor.dtype} of {tuple(tensor.shape)}."
            )
