"""Quantizing one model, a parameter at a time: what the loader and `quantize_model` share."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import ModelMixin
from diffusers.utils import logging
from torch import Tensor

from .codec.time_table import quantize_table
from .config import FORMAT_VERSION, BitsFusionConfig
from .nn.convert import pack_weight, packed_twin, replace_module
from .nn.time_features import TimeFeatureCache, TimeFeatureTable
from .nn.time_path import TimePath, install, lookup_from_config
from .plan import make_plan


class ModelPacker:
    """Replaces the layers of an unquantized model, in place, as their weights come in.

    Args:
        model: a diffusers model, with its parameters real or on the meta device.
        config: what is asked for; not changed.
        dtype: dtype of the float parameters that stay.
        exclude: module names to leave alone.
        progress: whether to show a progress bar.

    Raises:
        ValueError: see `plan.make_plan`.
    """

    def __init__(
        self,
        model: ModelMixin,
        config: BitsFusionConfig,
        dtype: torch.dtype,
        exclude: Iterable[str] = (),
        progress: bool = True,
    ):
        self.model = model
        self.dtype = dtype
        self.plan = make_plan(model, config, exclude)
        self.config = copy.deepcopy(config)
        self.config.format_version = FORMAT_VERSION
        self.config.layers = {
            name: {"bits": bits, "shape": list(model.get_submodule(name).weight.shape)}
            for name, bits in self.plan.bits.items()
        }
        self.config.time_embedding = {"type": self.plan.time_embedding}
        self._time_path = None if self.plan.time_embedding == "keep" else TimePath.of(model)
        self._time_parameters = (
            {
                f"{name}.{kind}"
                for name, layer in self._time_path.layers.items()
                for kind, _ in layer.named_parameters()
            }
            if self._time_path
            else set()
        )
        self._bar = logging.tqdm(total=len(self.plan.bits), desc="Quantizing layers", disable=not progress)

    def wants(self, parameter: str) -> bool:
        """Whether `take` must be given this parameter instead of the model."""
        return (
            parameter.removesuffix(".weight") in self.plan.bits
            and parameter.endswith(".weight")
            or (parameter in self._time_parameters)
        )

    def take(self, parameter: str, value: Tensor, device: torch.device | str | int) -> None:
        """Quantize the weight of a layer, or keep a parameter of the time path until the path is complete.

        Raises:
            ValueError: the values are not finite.
        """
        if parameter in self._time_parameters:
            if not torch.isfinite(value).all():
                raise ValueError(f"Cannot quantize: {parameter} holds NaN or infinite values.")
            set_module_tensor_to_device(self.model, parameter, device, value=value)
            self._time_parameters.discard(parameter)
            if not self._time_parameters:
                self._install_time_features()
            return
        name = parameter.removesuffix(".weight")
        packed = packed_twin(self.model.get_submodule(name), self.plan.bits[name], self.dtype)
        try:
            pack_weight(
                packed,
                value.to(device),
                scale_init=self.config.scale_init,
                scale_iterations=self.config.scale_iterations,
                balance=self.config.balance,
            )
        except ValueError as error:
            raise ValueError(f"Cannot quantize {parameter}: {error}.") from error
        replace_module(self.model, name, packed)
        self._bar.update()

    def _install_time_features(self) -> None:
        path = self._time_path
        assert path is not None
        described: dict[str, Any] = {
            "type": self.plan.time_embedding,
            "features": [list(size) for size in path.sizes],
            "removed_weights": path.num_weights,
            "removed_parameters": path.num_parameters,
        }
        if self.plan.time_embedding == "cache":
            described["timesteps"] = self.plan.timesteps
        else:
            described["num_timesteps"] = self.plan.num_timesteps
        lookup = lookup_from_config(described)
        if isinstance(lookup, TimeFeatureCache):
            timesteps = torch.tensor(self.plan.timesteps, dtype=torch.float32)
            lookup.set_features(torch.cat(list(path.compute(timesteps)), dim=1))
        elif isinstance(lookup, TimeFeatureTable):
            start = 0
            for features in path.compute(lookup.rows):
                lookup.set_codes(*quantize_table(features), start=start)
                start += features.shape[1]
        self.config.time_embedding = described
        lookup.to(path.layers["time_embedding.linear_1"].weight.device)
        install(self.model, lookup, path.sizes)

    def finish(self) -> BitsFusionConfig:
        """Close the progress bar; the config that describes the packed model.

        Raises:
            ValueError: a parameter that was not quantized holds NaN or infinite values.
        """
        for name, parameter in self.model.named_parameters():
            if parameter.is_floating_point() and not parameter.is_meta and not torch.isfinite(parameter).all():
                raise ValueError(f"Cannot quantize: {name} holds NaN or infinite values.")
        self._bar.close()
        return self.config


def refuse_dispatched(model: ModelMixin, action: str) -> None:
    """Refuse to swap layers under accelerate's hooks, which hold on to the old ones.

    Args:
        model: a diffusers model.
        action: what was asked for, for the message.

    Raises:
        ValueError: accelerate offloads the model or spreads it over devices.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            f"Cannot {action} this {type(model).__name__}: accelerate offloads it or spreads it over devices. Do it "
            "before, or take the hooks off by accelerate.hooks.remove_hook_from_submodules(model)."
        )
