"""`set_compute`: how the packed layers of a model compute, changed after loading."""

from __future__ import annotations

from torch import nn

from ..ops.dispatch import check_settings
from . import PackedWeight
from .attention import restore_attention, set_attention
from .feed_forward import set_geglu
from .packed_tensor import packed_tensors
from .residual_block import fuse_residual_blocks, restore_residual_blocks
from .transformer import set_channels_last

# Names of the layers whose input no norm precedes: the first convolution, shortcuts of residual blocks. On the shapes
# UNet, rounding their inputs made nearly all of the error of integers, for a few per cent of the operations.
_NOT_NORMALISED = ("conv_in", "conv_shortcut")


def set_compute(model: nn.Module, compute: str = "auto", resident: str = "packed") -> None:
    """Choose how the packed layers of a model compute. `size_report(model)` says which kernel each uses, and why.

    Args:
        model: a quantized model, or a part of one.
        compute: "exact": weights are decoded into the input's dtype, and torch does the rest, but for attention in
            bf16, which is computed by bf16 dot products on processors with AVX-512 BF16. "int8": activations are
            rounded to 8 bits in each call (a scale for each token of a linear layer, one scale and zero point for a
            convolution's input) and multiplied with the codes in integers, which is faster and changes outputs by
            about a percent; gradients stay those of the exact model. Layers whose input is not normalised
            (`conv_in`, `conv_shortcut`) stay exact. On those processors attention is computed by bf16 dot products,
            whatever the dtype. "auto": exact. In both a gated activation (GEGLU) is computed together with its
            projection, and norms of groups in one pass over memory with what stands around them.
        resident: "packed": codes are decoded for each call. "int8", with `compute="int8"`: one byte a weight is kept
            beside them, so that calls need not decode.

    Raises:
        ValueError: it is no model, or has no packed layers, or this machine cannot do what is asked; nothing has
            changed then.
    """
    check_settings(compute, resident)
    if not isinstance(model, nn.Module):
        raise ValueError(f"set_compute takes a model, such as `pipe.unet`, got {type(model).__name__}.")
    layers = packed_layers(model)
    if not layers and not packed_tensors(model):
        raise ValueError(f"This {type(model).__name__} has no layers quantized by diffusers_bitsfusion.")
    for name, layer in layers.items():
        # An adapter wraps the layer as `base_layer`.
        layer.sensitive = name.removesuffix(".base_layer").endswith(_NOT_NORMALISED)
        layer.select_kernel(compute, resident)
    for layer in layers.values():
        layer.set_compute(compute, resident)
    set_attention(model, any_dtype=compute == "int8")
    set_geglu(model, fused=True)
    set_channels_last(model, True)
    fuse_residual_blocks(model)
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if config is not None:
        config.compute, config.resident = compute, resident


def undo_fusions(model: nn.Module) -> None:
    """Give every module that `set_compute` made compute several operations in one its own class back."""
    restore_attention(model)
    set_geglu(model, fused=False)
    set_channels_last(model, False)
    restore_residual_blocks(model)


def packed_layers(model: nn.Module) -> dict[str, PackedWeight]:
    """Return the packed layers of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedWeight)}
