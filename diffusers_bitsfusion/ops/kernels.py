"""The kernels, with what each can do and why this machine lacks what it needs."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..native.library import native_library
from ..utils.private_names import TORCH_AMX, TORCH_VNNI

HALVES = (torch.float16, torch.bfloat16)
# Device types of layers that compute on a CPU; "meta" is that of an offloaded layer.
ON_CPU = ("cpu", "meta")

# Private operators of torch for weights that oneDNN has prepacked.
ONEDNN_OPERATORS = ("_nbytes", "data_ptr", "_get_mkldnn_serialized_md")

# Compute capability of the oldest GPUs whose tensor cores for int8 and bf16 Triton's compiler supports.
_CAPABILITY = (8, 0)

# Private operators of torch that take weights in oneDNN's floating-point layouts, or lay them out.
_PREPACKED_OPERATORS = (
    "_convolution_pointwise", "_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported",
)  # fmt: skip


def _no_obstacle(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Kernel:
    """An implementation of an operation, with what it can do.

    Attributes:
        name: for reports, after "by".
        devices: types of devices; empty for every one.
        dtypes: of what it computes in or writes; empty for every one.
        max_bits: of the codes.
        capability: compute capability of the oldest GPUs that it is for; None for all of them.
        why_not_here: why this machine lacks what the kernel needs on a device, None where it does not.
    """

    name: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    max_bits: int = 8
    capability: tuple[int, int] | None = None
    why_not_here: Callable[[torch.device], str | None] = _no_obstacle

    def why_not(self, device: torch.device, dtype: torch.dtype | None = None, bits: int = 1) -> str | None:
        """Return why it cannot compute this, or None where it can; without a dtype, any is assumed to do."""
        if self.devices and device.type not in self.devices:
            return f'{self.name} is not for the device type "{device.type}"'
        if self.dtypes and dtype is not None and dtype not in self.dtypes:
            return f"{self.name} is not for {dtype}"
        if bits > self.max_bits:
            return f"{self.name} is for codes of up to {self.max_bits} bits"
        obstacle = self.why_not_here(device)
        if obstacle is not None or self.capability is None:
            return obstacle
        if torch.cuda.get_device_capability(device) < self.capability:
            return f"{self.name} is for GPUs from compute capability {'.'.join(map(str, self.capability))} on"
        return None


def select(
    kernels: Sequence[Kernel], device: torch.device, dtype: torch.dtype | None = None, bits: int = 1
) -> Kernel | None:
    """Return the first kernel that can compute this, None where none can."""
    return next((kernel for kernel in kernels if kernel.why_not(device, dtype, bits) is None), None)


def why_no_triton(device: torch.device) -> str | None:
    """Return why the kernels for GPUs are missing, or None where they are not."""
    return None if has_triton() else "Triton, in which the kernels for GPUs are written, is not installed"


def _why_no_compiled_loops(device: torch.device) -> str | None:
    return None if native_library() is not None else "there is no C compiler"


def _why_no_vnni(device: torch.device) -> str | None:
    return None if has_vnni() else "this processor lacks VNNI"


def _why_no_avx2(device: torch.device) -> str | None:
    native = native_library()
    if native is None:
        return "torch multiplies integers slowly on this processor, which lacks VNNI, and there is no C compiler"
    return None if native.multiply is not None else "this processor has neither VNNI nor AVX2"


def _why_no_bf16_loop(device: torch.device) -> str | None:
    supported = TORCH_AMX.read(torch.cpu)
    if supported is None:
        return TORCH_AMX.missing()
    if supported():
        return "torch's uses the matrix instructions (AMX) of this processor"
    native = native_library()
    if native is None:
        return "there is no C compiler"
    return None if native.attention is not None else "this processor has no bf16 dot products (AVX-512 BF16)"


def _why_no_prepacked_onednn(device: torch.device) -> str | None:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "torch computes without oneDNN"
    if not hasattr(torch.ops.aten, "mkldnn_reorder_conv2d_weight"):
        return f"torch {torch.__version__} has no operator aten::mkldnn_reorder_conv2d_weight"
    gone = [name for name in (*ONEDNN_OPERATORS, *_PREPACKED_OPERATORS) if not hasattr(torch.ops.mkldnn, name)]
    if gone:
        return f"torch {torch.__version__} has no operator mkldnn::{gone[0]}"
    return _why_no_compiled_loops(device)


def _why_no_prepacked_bf16(device: torch.device) -> str | None:
    obstacle = _why_no_prepacked_onednn(device)
    if obstacle is not None or has_bf16(device):
        return obstacle
    return "oneDNN has no bf16 on this processor"  # oneDNN would raise where it should lay out a weight in bf16.


DECODE_TRITON = Kernel("Triton", ("cuda",), (torch.float32, *HALVES, torch.int8), why_not_here=why_no_triton)
DECODE_COMPILED = Kernel("compiled C", ON_CPU, why_not_here=_why_no_compiled_loops)
DECODE_TORCH = Kernel("plain torch")
DECODING = (DECODE_TRITON, DECODE_COMPILED, DECODE_TORCH)

# Kernel that decodes within the product: with few tokens a product waits for its weights alone, so it reads codes.
FUSED_LINEAR = Kernel("Triton", ("cuda",), HALVES, capability=_CAPABILITY, why_not_here=why_no_triton)

# Kernel of integer products and convolutions on a GPU.
INTEGERS_TRITON = Kernel("Triton", ("cuda",), capability=_CAPABILITY, why_not_here=why_no_triton)

# Kernels of integer products of tokens and codes on a CPU that are faster than products in fp32. Without VNNI, two
# products of a byte and a code are added in 16 bits, which codes of more bits overflow.
MULTIPLY_VNNI = Kernel("torch with VNNI", ON_CPU, why_not_here=_why_no_vnni)
MULTIPLY_COMPILED = Kernel("compiled C", ON_CPU, max_bits=7, why_not_here=_why_no_avx2)
INTEGER_PRODUCTS = (MULTIPLY_VNNI, MULTIPLY_COMPILED)

# Kernel that rounds activations to eight bits, and rescales sums, on a CPU.
ROUND_COMPILED = Kernel("compiled C", ("cpu",), why_not_here=_why_no_compiled_loops)

# Kernel of norms of groups, with the sum before and the activation after, on a CPU; it has room for so many groups.
NORMS_COMPILED = Kernel("compiled C", ("cpu",), (torch.float32, torch.bfloat16), why_not_here=_why_no_compiled_loops)
MOST_GROUPS = 128

# Kernels of exact layers whose weight is decoded into oneDNN's own layout: convolutions, and linear layers in bf16;
# linear layers in fp32 take no less time by it.
_INTO_ONEDNN = "compiled C, into oneDNN's layout"
PREPACKED_FP32 = Kernel(_INTO_ONEDNN, ("cpu",), (torch.float32,), why_not_here=_why_no_prepacked_onednn)
PREPACKED_BF16 = Kernel(_INTO_ONEDNN, ("cpu",), (torch.bfloat16,), why_not_here=_why_no_prepacked_bf16)
PREPACKED = (PREPACKED_FP32, PREPACKED_BF16)

ATTENTION_BF16 = Kernel("bf16 dot products in compiled C", ON_CPU, why_not_here=_why_no_bf16_loop)


def has_bf16(device: torch.device) -> bool:
    """Return whether a device has instructions for bf16; a CPU without them takes longer for it than for fp32."""
    if device.type not in ON_CPU:
        return True
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def has_vnni() -> bool:
    """Return whether the processor multiplies bytes and adds the products in 32 bits."""
    supported = TORCH_VNNI.read(torch.cpu)
    return supported is not None and supported()


@functools.cache
def has_triton() -> bool:
    """Return whether the kernels for GPUs can be imported."""
    return importlib.util.find_spec("triton") is not None
