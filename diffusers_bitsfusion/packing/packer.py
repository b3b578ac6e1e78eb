"""Quantization of one model, a parameter at a time, by the loader and by `quantize_model`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import ModelMixin
from diffusers.utils import logging
from torch import Tensor, nn

from ..calibration.layers import CalibratedLayer
from ..calibration.rate_target import quantize_rows_at_rate
from ..codec.radix import pack_dense
from ..codec.schema import CheckpointSchema, LayerSchema, is_tensor_name
from ..codec.time_schema import TimeFeaturesSchema
from ..nn.conversion import pack_weight, packed_from_float, replace_module
from ..nn.packed import PackedWeight
from ..nn.packed_tensor import PackedTensor, hold, pack_tensor
from ..nn.time_path import install
from ..utils.errors import printable
from ..utils.finite import refuse_not_finite
from .plan import Plan
from .tensors import TensorPlace, packable_tensors
from .time_lookup import make_lookup

# Floating dtypes that layers of torch compute in; fp8, for example, only stores.
_COMPUTING_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class ModelPacker:
    """Packer that replaces the layers of an unquantized model, in place, as their weights come in.

    Args:
        model: diffusers model, whose parameters may be on the meta device.
        plan: plan of the model.
        dtype: dtype of the parameters that stay in floating point.
        progress: whether to show a progress bar.

    Attributes:
        model: the model.
        dtype: the dtype.
        plan: the plan.
        schema: schema of the checkpoint.

    Raises:
        ValueError: layers do not compute in the dtype.
    """

    def __init__(
        self,
        model: ModelMixin,
        plan: Plan,
        dtype: torch.dtype,
        progress: bool = True,
    ) -> None:
        if dtype not in _COMPUTING_DTYPES:
            raise ValueError(
                f"Cannot quantize a {type(model).__name__} in {dtype}: norms and biases, which stay in floating "
                "point, do not compute in it. Cast the model first, for example by `.to(torch.bfloat16)`."
            )
        self.model = model
        self.dtype = dtype
        self.plan = plan
        self.schema = plan.schema(model)
        path = plan.replaced_path
        time_layers = {} if path is None else path.layers
        self._time_parameters = {
            f"{name}.{kind}" for name, layer in time_layers.items() for kind, _ in layer.named_parameters()
        }
        self._progress = progress
        self._tensors = {place.full_parameter: place for place in self.plan.tensors.values()}

    @functools.cached_property
    def _bar(self) -> Any:
        """Progress bar, shown from the first layer on, since a long calibration may come before."""
        return logging.tqdm(total=len(self.plan.bits), desc="Quantizing layers", disable=not self._progress)

    def wants(self, parameter: str) -> bool:
        """Return whether `take` must receive this parameter instead of the model."""
        is_packed_weight = parameter.endswith(".weight") and parameter.removesuffix(".weight") in self.plan.bits
        return is_packed_weight or parameter in self._tensors or parameter in self._time_parameters

    def take(self, parameter: str, value: Tensor, device: torch.device | str | int) -> None:
        """Quantize the weight of a layer, or set a parameter of the time path until the path is complete.

        Args:
            parameter: name of a parameter that `wants` is true for.
            value: value of the parameter, of any floating dtype and device.
            device: device of the packed layer or of the parameter.

        Raises:
            ValueError: the value holds NaN or infinite numbers.
        """
        if parameter in self._time_parameters:
            if not torch.isfinite(value).all():
                raise ValueError(f"Cannot quantize: {parameter} holds NaN or infinite values.")
            set_module_tensor_to_device(self.model, parameter, device, value=value)
            self._time_parameters.discard(parameter)
            if not self._time_parameters:
                time = install_time_features(self.model, self.plan, self.schema.time_features, self.dtype)
                self.schema = self.schema.with_time_features(time)
            return
        try:
            if parameter in self._tensors:
                self._pack_tensor(self._tensors[parameter], value.to(device))
            else:
                self._pack_layer(parameter.removesuffix(".weight"), value.to(device))
        except ValueError as error:
            raise ValueError(f"Cannot quantize {parameter}: {error}.") from error
        self._bar.update()

    def _empty_layer(self, name: str) -> PackedWeight:
        layer = self.model.get_submodule(name)
        return packed_from_float(layer, self.plan.bits[name], self.dtype, scale_dtype=self.plan.scale_dtype)

    def _pack_layer(self, name: str, value: Tensor) -> None:
        packed = self._empty_layer(name)
        if (rate := self.plan.rates.get(name)) is None:
            pack_weight(packed, value, self.plan.rounding)
        else:
            codes, scale = quantize_rows_at_rate(value.detach().flatten(1).float(), [], packed.bits, rate)
            packed.set_codes(pack_dense(codes, packed.bits), scale)
        replace_module(self.model, name, packed)

    def _pack_tensor(self, place: TensorPlace, value: Tensor) -> None:
        packed = pack_tensor(self.schema.layers[place.name], value, self.dtype, self.plan.rounding)
        hold(self.model.get_submodule(place.owner), place.parameter, packed)

    def take_calibrated(self, name: str, layer: CalibratedLayer, device: torch.device) -> None:
        """Pack a layer with the codes, scale and bias of its calibration."""
        packed = self._empty_layer(name)
        packed.set_codes(layer.codes.to(device), layer.scale.to(device))
        if layer.bias is not None:
            packed.bias = nn.Parameter(layer.bias.to(packed.bias), requires_grad=packed.bias.requires_grad)
        replace_module(self.model, name, packed)
        self._bar.update()

    def finish(self) -> CheckpointSchema:
        """Close the progress bar, and return the schema of the packed model's checkpoint.

        Raises:
            ValueError: a parameter that was not quantized holds NaN or infinite values.
        """
        refuse_not_finite(self.model, "quantize")
        self._bar.close()
        return self.schema


def install_time_features(
    model: ModelMixin, plan: Plan, schema: TimeFeaturesSchema, dtype: torch.dtype
) -> TimeFeaturesSchema:
    """Replace the time path of `model`, whose weights are complete, by the look-up that `plan` asks for, if any.

    Args:
        model: model that the plan was made for.
        plan: plan of the model.
        schema: schema of the time features that the plan has.
        dtype: dtype of the model.

    Returns:
        The schema of the look-up, which has the rank of the features.
    """
    path = plan.replaced_path
    if path is None:
        return schema
    lookup, schema = make_lookup(path, schema)
    lookup.to(path.layers["time_embedding.linear_1"].weight.device)
    install(model, lookup, path.sizes, dtype)
    return schema


def install_packed_layers(
    model: nn.Module, schema: CheckpointSchema, weight_dtype: Callable[[str], torch.dtype]
) -> None:
    """Replace the float layers of a model on the meta device by the packed layers of a checkpoint, still empty.

    Args:
        model: model of the checkpoint's class, with float layers.
        schema: schema of the checkpoint.
        weight_dtype: function from the name of a layer to the dtype of its weight.

    Raises:
        ValueError: the checkpoint does not fit the model.
    """
    modules = dict(model.named_modules())
    places = packable_tensors(model, embeddings=True) if any(map(is_tensor_name, schema.layers)) else {}
    for name, layer in schema.layers.items():
        if name in places:
            _install_packed_tensor(model, places[name], layer, weight_dtype(name))
            continue
        module = modules.get(name)
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            raise ValueError(
                f"The checkpoint's config packs {printable(name)}, which {type(model).__name__} does not have."
            )
        if tuple(module.weight.shape) != layer.shape:
            raise ValueError(
                f"The checkpoint's config gives {printable(name)} the shape {list(layer.shape)}; "
                f"{type(model).__name__} has {list(module.weight.shape)}."
            )
        packed = packed_from_float(module, layer.bits, weight_dtype(name), layer.branch_rank, layer.scale_dtype)
        replace_module(model, name, packed)


def _install_packed_tensor(model: nn.Module, place: TensorPlace, layer: LayerSchema, dtype: torch.dtype) -> None:
    expected = place.schema(layer.bits, layer.scale_dtype)
    if layer != expected:
        raise ValueError(
            f"The checkpoint's config gives {printable(place.name)} {layer.to_json()}; {type(model).__name__} has "
            f"{expected.to_json()}."
        )
    hold(model.get_submodule(place.owner), place.parameter, PackedTensor(layer, dtype))


def raise_missing(model: nn.Module, names: list[str]) -> NoReturn:
    """Refuse a checkpoint that lacks tensors.

    Raises:
        ValueError: always; where it lacks all codes, it says that the weights are of another model.
    """
    packed = sum(isinstance(module, (PackedWeight, PackedTensor)) for module in model.modules())
    if packed and sum(name.endswith(".codes") for name in names) == packed:
        raise ValueError(
            f"The weights of this {type(model).__name__} are not packed, though its config.json says so: they are "
            "another model's in the same folder. Load the packed ones, which may have another `variant`."
        )
    shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    raise ValueError(f"The checkpoint for {type(model).__name__} lacks {shown}. It is incomplete; download it again.")
