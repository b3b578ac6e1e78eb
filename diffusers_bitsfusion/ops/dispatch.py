"""The one place that decides which kernel computes, and why; what each can do is declared in `kernels.py`."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

import torch

from ..utils.private_names import TORCH_VNNI
from .kernels import (
    ATTENTION_BF16,
    DECODE_TRITON,
    DECODING,
    FUSED_LINEAR,
    HALVES,
    INTEGER_PRODUCTS,
    INTEGERS_TRITON,
    MOST_GROUPS,
    MULTIPLY_COMPILED,
    NORMS_COMPILED,
    ON_CPU,
    ONEDNN_OPERATORS,
    PREPACKED,
    PREPACKED_FP32,
    has_vnni,
    select,
    why_no_triton,
)

COMPUTES = ("auto", "exact", "int8")
RESIDENTS = ("packed", "int8")

# Rows of the smallest tile of a GPU's tensor cores.
FEW_TOKENS = 16

# Outputs from which on the weight of a convolution in fp32 is decoded into oneDNN's layout, and channels from which on
# a norm in fp32 is no longer torch's: smaller ones gain little, and so give the bits of the dequantized model.
_FEWEST_OUTPUTS = 256


@dataclass(frozen=True)
class KernelSelection:
    """The arithmetic of a layer, where its weights come from, and why.

    Attributes:
        arithmetic: "exact", in the input's dtype; or "int8", integer products of rounded activations.
        weights: where its weights come from in each call.
        reason: why this arithmetic was chosen.
    """

    arithmetic: str
    weights: str
    reason: str


def check_settings(compute: str, resident: str) -> None:
    """Raise `ValueError` for values that do not exist or do not go together."""
    for name, value, choices in (("compute", compute, COMPUTES), ("resident", resident, RESIDENTS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    if resident == "int8" and compute != "int8":
        raise ValueError(f'resident="int8" is for compute="int8" only, got compute={compute!r}')


def select_for_layer(
    compute: str, resident: str, bits: int, device: torch.device, sensitive: bool = False, linear: bool = False
) -> KernelSelection:
    """Return the kernels by which a layer computes, and why.

    Args:
        compute: one of `COMPUTES`.
        resident: one of `RESIDENTS`.
        bits: of the layer's codes, 1 to 8.
        device: where the codes are; "meta" for an offloaded layer, which is judged as on a CPU.
        sensitive: whether the layer's input is not normalised, so that eight bits are too few for it.
        linear: whether it is a linear layer rather than a convolution.

    Raises:
        ValueError: the device has no integer arithmetic, or codes that are offloaded should stay resident.
    """
    if compute != "int8":
        reason = 'compute="auto" uses exact' if compute == "auto" else 'compute="exact"'
        return KernelSelection("exact", _decoding(device, linear), reason)
    check_device(compute, device)
    if sensitive:
        return KernelSelection(
            "exact", _decoding(device, linear), "its input is not normalised: eight bits are too few for it"
        )
    if device.type in ON_CPU and (obstacle := _why_slow_integers(bits, device, linear)) is not None:
        return KernelSelection("exact", _decoding(device), obstacle)
    if resident == "packed":
        return KernelSelection("int8", _decoding(device), 'compute="int8"')
    if device.type == "meta":
        raise ValueError('resident="int8" keeps all weights in memory, but the model is offloaded. Use "packed".')
    return KernelSelection("int8", "int8 codes kept in memory", 'compute="int8", resident="int8"')


def check_device(compute: str, device: torch.device) -> None:
    """Refuse what no layer can do on a device.

    Args:
        compute: one of `COMPUTES`.
        device: device of a model.

    Raises:
        ValueError: integers are asked for, and the device has no integer arithmetic.
    """
    if compute == "int8" and (obstacle := why_no_int8(device)) is not None:
        raise ValueError(f'compute="int8" is not possible here: {obstacle}. Use compute="exact".')


def _why_slow_integers(bits: int, device: torch.device, linear: bool) -> str | None:
    """Return why a layer on a CPU gains nothing from integers, or None where it does.

    Convolutions need no compiler: without one they are oneDNN's.
    """
    if bits > MULTIPLY_COMPILED.max_bits and not has_vnni():
        return f"codes of {bits} bits would overflow int8 products on this processor, which lacks VNNI"
    return why_no_int_mm() if linear else None


def multiplies_blocks(device: torch.device, bits: int, groups: int = 1) -> bool:
    """Return whether integer products are by loops of this package, which take codes in blocks of outputs.

    They are so on a CPU without VNNI. Convolutions with groups are oneDNN's everywhere.
    """
    return groups == 1 and select(INTEGER_PRODUCTS, device, bits=bits) is MULTIPLY_COMPILED


def why_no_int_mm() -> str | None:
    """Return why integer products are slower on a CPU than those of fp32, or None where they are not."""
    device = torch.device("cpu")
    return None if select(INTEGER_PRODUCTS, device) is not None else MULTIPLY_COMPILED.why_not(device)


def fuses_decoding(device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Return whether a linear layer decodes within its product rather than before it."""
    return 0 < tokens <= FEW_TOKENS and FUSED_LINEAR.why_not(device, dtype) is None


def takes_layout(x: torch.Tensor, outputs: int) -> bool:
    """Return whether the weight of an exact convolution is decoded into oneDNN's layout.

    In fp32 small layers are not: they gain little, and so give the bits that the dequantized layer gives.
    """
    return (x.dtype == torch.bfloat16 or outputs >= _FEWEST_OUTPUTS) and select(
        PREPACKED, x.device, x.dtype
    ) is not None


def wants_channels_last(x: torch.Tensor, int8: bool, outputs: int) -> bool:
    """Return whether an exact convolution, or one in integers on a GPU, computes in channels last.

    So it does in half precision on a GPU, whose tensor cores read it so, and where oneDNN does on a CPU: in bf16, and
    in fp32 with weights in its layout.
    """
    if x.device.type == "cpu":
        layout = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and outputs >= _FEWEST_OUTPUTS and _lays_out())
        return x.dim() == 4 and not int8 and layout
    return x.device.type == "cuda" and x.dim() == 4 and (int8 or x.dtype in HALVES)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _lays_out() -> bool:
    """Return whether weights in fp32 are decoded into oneDNN's layout."""
    return PREPACKED_FP32.why_not(torch.device("cpu")) is None


def why_no_int8(device: torch.device) -> str | None:
    """Return why a device cannot compute with int8 codes, or None where it can."""
    if device.type == "cuda":
        return _why_no_int8_on_gpu(device)
    if device.type not in ON_CPU:
        return f'there is no integer arithmetic for the device type "{device.type}"'
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"torch has no fast int8 convolution for {platform.machine()} processors, only for x86"
    if not torch.backends.mkldnn.is_available():
        return "this build of torch lacks oneDNN"
    if TORCH_VNNI.read(torch.cpu) is None:
        return TORCH_VNNI.missing()
    gone = [name for name in ONEDNN_OPERATORS if not hasattr(torch.ops.mkldnn, name)]
    return f"torch {torch.__version__} has no operator mkldnn::{gone[0]}" if gone else None


def _why_no_int8_on_gpu(device: torch.device) -> str | None:
    obstacle = why_no_triton(device)
    if obstacle is not None or INTEGERS_TRITON.why_not(device) is None:
        return obstacle
    return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"


@functools.cache
def why_no_bf16_attention(device: torch.device) -> str | None:
    """Return why attention is torch's own, or None where it is by compiled bf16 dot products."""
    if device.type not in ON_CPU:
        return f'torch has its own for the device type "{device.type}"'
    return ATTENTION_BF16.why_not(device)


def why_no_compiled_norm(device: torch.device, dtype: torch.dtype, channels: int, groups: int) -> str | None:
    """Return why torch computes a norm of groups of channels, or None where the compiled loops do."""
    if dtype == torch.float32 and channels < _FEWEST_OUTPUTS:
        return f"in fp32 norms of fewer than {_FEWEST_OUTPUTS} channels gain little"
    if groups > MOST_GROUPS:
        return f"{NORMS_COMPILED.name} is for at most {MOST_GROUPS} groups"
    return NORMS_COMPILED.why_not(device, dtype)


def _decoding(device: torch.device, may_fuse: bool = False) -> str:
    kernel = select(DECODING, device)
    assert kernel is not None  # Plain torch decodes everywhere.
    fused = may_fuse and kernel is DECODE_TRITON
    within = f", within the product for up to {FEW_TOKENS} tokens in half precision" if fused else ""
    return f"decoded in each call by {kernel.name}{within}"
