"""The one place that decides which kernel computes: declarations of the kernels, and the choice among them."""

from __future__ import annotations

import functools
import importlib.util
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..native.library import native_library
from ..utils.private_names import TORCH_AMX, TORCH_VNNI

COMPUTES = ("auto", "exact", "int8")
RESIDENTS = ("packed", "int8")

# Compute capability of the oldest GPUs whose tensor cores for int8 and bf16 Triton's compiler supports.
_CAPABILITY = (8, 0)

# Rows of the smallest tile of a GPU's tensor cores.
FEW_TOKENS = 16

_HALVES = (torch.float16, torch.bfloat16)
# Device types of layers that compute on a CPU; "meta" is that of an offloaded layer.
_ON_CPU = ("cpu", "meta")

# Private operators of torch for weights that oneDNN has prepacked.
_ONEDNN_OPERATORS = ("_nbytes", "data_ptr", "_get_mkldnn_serialized_md")

# Outputs from which on the weight of a convolution in fp32 is decoded into oneDNN's layout, and channels from which on
# a norm in fp32 is no longer torch's: smaller ones gain little, and so give the bits of the dequantized model.
_FEWEST_OUTPUTS = 256

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


def _why_no_triton(device: torch.device) -> str | None:
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
    gone = [name for name in (*_ONEDNN_OPERATORS, *_PREPACKED_OPERATORS) if not hasattr(torch.ops.mkldnn, name)]
    if gone:
        return f"torch {torch.__version__} has no operator mkldnn::{gone[0]}"
    return _why_no_compiled_loops(device)


def _why_no_prepacked_bf16(device: torch.device) -> str | None:
    obstacle = _why_no_prepacked_onednn(device)
    if obstacle is not None or has_bf16(device):
        return obstacle
    return "oneDNN has no bf16 on this processor"  # oneDNN would raise where it should lay out a weight in bf16.


DECODE_TRITON = Kernel("Triton", ("cuda",), (torch.float32, *_HALVES, torch.int8), why_not_here=_why_no_triton)
DECODE_COMPILED = Kernel("compiled C", _ON_CPU, why_not_here=_why_no_compiled_loops)
DECODE_TORCH = Kernel("plain torch")
DECODING = (DECODE_TRITON, DECODE_COMPILED, DECODE_TORCH)

# Kernel that decodes within the product: with few tokens a product waits for its weights alone, so it reads codes.
FUSED_LINEAR = Kernel("Triton", ("cuda",), _HALVES, capability=_CAPABILITY, why_not_here=_why_no_triton)

# Kernel of integer products and convolutions on a GPU.
INTEGERS_TRITON = Kernel("Triton", ("cuda",), capability=_CAPABILITY, why_not_here=_why_no_triton)

# Kernels of integer products of tokens and codes on a CPU that are faster than products in fp32. Without VNNI, two
# products of a byte and a code are added in 16 bits, which codes of more bits overflow.
MULTIPLY_VNNI = Kernel("torch with VNNI", _ON_CPU, why_not_here=_why_no_vnni)
MULTIPLY_COMPILED = Kernel("compiled C", _ON_CPU, max_bits=7, why_not_here=_why_no_avx2)
INTEGER_PRODUCTS = (MULTIPLY_VNNI, MULTIPLY_COMPILED)

# Kernel that rounds activations to eight bits, and rescales sums, on a CPU.
ROUND_COMPILED = Kernel("compiled C", ("cpu",), why_not_here=_why_no_compiled_loops)

# Kernel of norms of groups, with the sum before and the activation after, on a CPU; it has room for so many groups.
NORMS_COMPILED = Kernel("compiled C", ("cpu",), (torch.float32, torch.bfloat16), why_not_here=_why_no_compiled_loops)
_MOST_GROUPS = 128

# Kernels of exact layers whose weight is decoded into oneDNN's own layout: convolutions, and linear layers in bf16;
# linear layers in fp32 take no less time by it.
_INTO_ONEDNN = "compiled C, into oneDNN's layout"
PREPACKED_FP32 = Kernel(_INTO_ONEDNN, ("cpu",), (torch.float32,), why_not_here=_why_no_prepacked_onednn)
PREPACKED_BF16 = Kernel(_INTO_ONEDNN, ("cpu",), (torch.bfloat16,), why_not_here=_why_no_prepacked_bf16)
PREPACKED = (PREPACKED_FP32, PREPACKED_BF16)

ATTENTION_BF16 = Kernel("bf16 dot products in compiled C", _ON_CPU, why_not_here=_why_no_bf16_loop)


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
    if device.type in _ON_CPU and (obstacle := _why_slow_integers(bits, device, linear)) is not None:
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
    """Return why a layer on a CPU gains nothing from integers, or None where it does; oneDNN does convolutions."""
    if bits > MULTIPLY_COMPILED.max_bits and not has_vnni():
        return f"codes of {bits} bits would overflow int8 products on this processor, which lacks VNNI"
    return why_no_int_mm() if linear else None


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
    return x.device.type == "cuda" and x.dim() == 4 and (int8 or x.dtype in _HALVES)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _lays_out() -> bool:
    """Return whether weights in fp32 are decoded into oneDNN's layout."""
    return PREPACKED_FP32.why_not(torch.device("cpu")) is None


def why_no_int8(device: torch.device) -> str | None:
    """Return why a device cannot compute with int8 codes, or None where it can."""
    if device.type == "cuda":
        return _why_no_int8_on_gpu(device)
    if device.type not in _ON_CPU:
        return f'there is no integer arithmetic for the device type "{device.type}"'
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"torch has no fast int8 convolution for {platform.machine()} processors, only for x86"
    if not torch.backends.mkldnn.is_available():
        return "this build of torch lacks oneDNN"
    if TORCH_VNNI.read(torch.cpu) is None:
        return TORCH_VNNI.missing()
    gone = [name for name in _ONEDNN_OPERATORS if not hasattr(torch.ops.mkldnn, name)]
    return f"torch {torch.__version__} has no operator mkldnn::{gone[0]}" if gone else None


def _why_no_int8_on_gpu(device: torch.device) -> str | None:
    if not has_triton() or INTEGERS_TRITON.why_not(device) is None:
        return _why_no_triton(device)
    return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"


@functools.cache
def why_no_bf16_attention(device: torch.device) -> str | None:
    """Return why attention is torch's own, or None where it is by compiled bf16 dot products."""
    if device.type not in _ON_CPU:
        return f'torch has its own for the device type "{device.type}"'
    return ATTENTION_BF16.why_not(device)


def why_no_compiled_norm(device: torch.device, dtype: torch.dtype, channels: int, groups: int) -> str | None:
    """Return why torch computes a norm of groups of channels, or None where the compiled loops do."""
    if dtype == torch.float32 and channels < _FEWEST_OUTPUTS:
        return f"in fp32 norms of fewer than {_FEWEST_OUTPUTS} channels gain little"
    if groups > _MOST_GROUPS:
        return f"{NORMS_COMPILED.name} is for at most {_MOST_GROUPS} groups"
    return NORMS_COMPILED.why_not(device, dtype)


def has_bf16(device: torch.device) -> bool:
    """Return whether a device has instructions for bf16; a CPU without them takes longer for it than for fp32."""
    if device.type not in _ON_CPU:
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


def _decoding(device: torch.device, may_fuse: bool = False) -> str:
    kernel = select(DECODING, device)
    assert kernel is not None  # Plain torch decodes everywhere.
    fused = may_fuse and kernel is DECODE_TRITON
    within = f", within the product for up to {FEW_TOKENS} tokens in half precision" if fused else ""
    return f"decoded in each call by {kernel.name}{within}"
