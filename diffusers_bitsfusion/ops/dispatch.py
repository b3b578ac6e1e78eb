"""The one place that decides how a packed layer computes."""

from __future__ import annotations

import functools
import importlib.util
import platform
from dataclasses import dataclass

import torch

from ..native.library import native_library
from .products import why_no_int_mm

COMPUTES = ("auto", "exact", "int8")
RESIDENTS = ("packed", "int8")

# Of the GPUs whose tensor cores for int8 and bf16 Triton's compiler serves.
_CAPABILITY = (8, 0)

# Rows of the smallest tile of a GPU's tensor cores.
FEW_TOKENS = 16

# Without VNNI, two products of a byte and a code are added in 16 bits, which codes of more bits overflow.
_BITS_WITHOUT_VNNI = 7


@dataclass(frozen=True)
class Way:
    """How a layer computes.

    Attributes:
        arithmetic: "exact", in the input's dtype; or "int8", integer products of rounded activations.
        weights: where its weights come from in each call.
        reason: why this arithmetic was chosen.
    """

    arithmetic: str
    weights: str
    reason: str


def check_settings(compute: str, resident: str) -> None:
    """Raises `ValueError` for values that do not exist or do not go together."""
    for name, value, choices in (("compute", compute, COMPUTES), ("resident", resident, RESIDENTS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    if resident == "int8" and compute != "int8":
        raise ValueError(f'resident="int8" is for compute="int8" only, got compute={compute!r}')


def choose_way(
    compute: str, resident: str, bits: int, device: torch.device, sensitive: bool = False, linear: bool = False
) -> Way:
    """The way of a layer.

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
        reason = 'compute="auto" takes exact' if compute == "auto" else 'compute="exact"'
        return Way("exact", _decoding(device, linear), reason)
    obstacle = why_no_int8(device)
    if obstacle is not None:
        raise ValueError(f'compute="int8" is not possible here: {obstacle}. Use compute="exact".')
    if sensitive:
        return Way("exact", _decoding(device, linear), "its input is not normalised: eight bits are too few for it")
    if device.type in ("cpu", "meta") and bits > _BITS_WITHOUT_VNNI and not torch.cpu._is_vnni_supported():
        reason = f"codes of {bits} bits would overflow int8 products on this processor, which lacks VNNI"
        return Way("exact", _decoding(device), reason)
    if device.type in ("cpu", "meta") and linear and (slow := why_no_int_mm()) is not None:
        return Way("exact", _decoding(device), slow)
    if resident == "packed":
        return Way("int8", _decoding(device), 'compute="int8"')
    if device.type == "meta":
        raise ValueError('resident="int8" keeps all weights in memory, but the model is offloaded. Use "packed".')
    return Way("int8", "int8 codes kept in memory", 'compute="int8", resident="int8"')


def fuses_decoding(device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Whether a linear layer decodes within its product rather than before it.

    So on a GPU, for few tokens in half precision: the product then waits for its weights alone, and reads them as
    codes instead of writing and reading them decoded.
    """
    few = 0 < tokens <= FEW_TOKENS and dtype in (torch.float16, torch.bfloat16)
    return few and device.type == "cuda" and has_triton() and torch.cuda.get_device_capability(device) >= _CAPABILITY


def why_no_int8(device: torch.device) -> str | None:
    """Why a device cannot compute with int8 codes, or None where it can."""
    if device.type == "cuda":
        return _why_no_int8_on_cuda(device)
    if device.type not in ("cpu", "meta"):
        return f'there is no integer arithmetic for the device type "{device.type}"'
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"torch has no fast int8 convolution for {platform.machine()} processors, only for x86"
    if not torch.backends.mkldnn.is_available():
        return "this build of torch lacks oneDNN"
    return None


def _why_no_int8_on_cuda(device: torch.device) -> str | None:
    if not has_triton():
        return "Triton, in which the integer kernels are written, is not installed"
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


@functools.cache
def why_no_bf16_attention(device: torch.device) -> str | None:
    """Why attention is torch's own, or None where it is by compiled bf16 dot products."""
    if device.type not in ("cpu", "meta"):
        return f'torch has its own for the device type "{device.type}"'
    if torch.cpu._is_amx_tile_supported():
        return "torch's uses the matrix instructions (AMX) of this processor"
    native = native_library()
    if native is None:
        return "there is no C compiler"
    return None if native.attention is not None else "this processor has no bf16 dot products (AVX-512 BF16)"


@functools.cache
def has_triton() -> bool:
    """Whether the kernels for GPUs can be imported."""
    return importlib.util.find_spec("triton") is not None


def _decoding(device: torch.device, may_fuse: bool = False) -> str:
    if device.type == "cuda" and has_triton():
        fused = f", within the product for up to {FEW_TOKENS} tokens in half precision"
        return f"decoded in each call by Triton{fused if may_fuse else ''}"
    if device.type in ("cpu", "meta") and native_library() is not None:
        return "decoded in each call by compiled C"
    return "decoded in each call by plain torch"
