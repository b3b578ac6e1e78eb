"""Models that diffusers makes from a packed one: by its config, they are plain; by its weights, they are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
from diffusers import ConfigMixin, UNetMotionModel
from torch import nn

from ..config.bitsfusion import BitsFusionMethod
from ..nn import PackedWeight, TimeFeatures
from ..nn.packed_tensor import PackedTensor

# Keys of a packed model's config that say something of its weights.
PACKED_KEYS = ("quantization_config", "_pre_quantization_dtype")

# Class methods that copy the weights of a model, some of them leaving out in silence what does not fit.
_COPYING = (
    ("ControlNetModel", "from_unet"),
    ("ControlNetUnionModel", "from_unet"),
    ("SparseControlNetModel", "from_unet"),
    ("UNetControlNetXSModel", "from_unet"),
    ("UNetMotionModel", "from_unet2d"),
    ("FluxControlNetModel", "from_transformer"),
    ("HunyuanDiT2DControlNetModel", "from_transformer"),
    ("QwenImageControlNetModel", "from_transformer"),
    ("SD3ControlNetModel", "from_transformer"),
)


def register_derived_models() -> None:
    """Wrap the methods of diffusers that make a model from another's config or weights."""
    ConfigMixin.from_config = classmethod(_wrap_from_config(ConfigMixin.from_config.__func__))
    for name, method in _COPYING:
        owner = getattr(diffusers, name, None)  # Earlier versions of diffusers lack some.
        if owner is not None and method in vars(owner):
            setattr(owner, method, classmethod(_wrap_copying(vars(owner)[method].__func__)))
    UNetMotionModel.load_motion_modules = _wrap_load_motion(UNetMotionModel.load_motion_modules)
    UNetMotionModel.save_motion_modules = _wrap_save_motion(UNetMotionModel.save_motion_modules)


def _wrap_from_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `ConfigMixin.from_config`, so that a model without packed weights does not say that it is packed."""

    @functools.wraps(original)
    def from_config(cls: type, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(config, Mapping) and is_packed(config.get("quantization_config")):
            config = {key: value for key, value in config.items() if key not in PACKED_KEYS}
        return original(cls, config, *args, **kwargs)

    return from_config


def is_packed(config: Any) -> bool:
    """Return whether a quantization config, as an object or of a file, is of this method."""
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    return bool(method == BitsFusionMethod.BITSFUSION)


def _wrap_copying(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a class method that copies weights, so that it refuses packed ones."""

    @functools.wraps(original)
    def copying(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not any(value is False for name, value in kwargs.items() if name.startswith("load_weights")):
            for source in (*args, *kwargs.values()):
                if isinstance(source, nn.Module) and _holds_packed(source):
                    raise ValueError(
                        f"{cls.__name__}.{original.__name__} copies weights, and those of {type(source).__name__} are "
                        "packed. Call `dequantize()` on it first, or on a copy (`copy.deepcopy`); the new model can "
                        "be quantized by `quantize_model`."
                    )
        return original(cls, *args, **kwargs)

    return copying


def _wrap_load_motion(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `UNetMotionModel.load_motion_modules`, so that packed and plain modules are not mixed."""

    @functools.wraps(original)
    def load_motion_modules(self: Any, motion_adapter: Any) -> Any:
        packed = [model for model in (self, motion_adapter) if model is not None and _holds_packed(model)]
        if len(packed) == 1:
            raise ValueError(
                f"Motion modules are copied, and those of {type(packed[0]).__name__} alone are packed. Call "
                "`dequantize()` on it first; the whole can be quantized afterwards."
            )
        return original(self, motion_adapter)

    return load_motion_modules


def _wrap_save_motion(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `UNetMotionModel.save_motion_modules`, which saves them as a plain adapter."""

    @functools.wraps(original)
    def save_motion_modules(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _holds_packed(self):
            raise ValueError(
                "Motion modules are saved as a plain MotionAdapter, and those of this UNetMotionModel are packed. "
                "Call `dequantize()` on it first, or on a copy (`copy.deepcopy`); or save all of it by "
                "`save_pretrained`."
            )
        return original(self, *args, **kwargs)

    return save_motion_modules


def _holds_packed(model: nn.Module) -> bool:
    return any(isinstance(module, (PackedTensor, PackedWeight, TimeFeatures)) for module in model.modules())
