"""The Triton kernels, compiled for GPUs that are not here: each launch as it is made, down to machine code."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_bitsfusion.codec.radix import dense_width, digits_per_word

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton; Linux only)"
)

CAPABILITIES = (80, 90)  # Ampere and Hopper, whose tensor cores are told different things
SHARED_MEMORY = 99 << 10  # bytes that a program may have on the smallest of them


def launches(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """Kernels that a call launches and their arguments, instead of launching them."""
    from triton.runtime.jit import JITFunction

    recorded = []

    def record(kernel: Any, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        recorded.append((kernel, dict(zip(kernel.arg_names, values, strict=False)) | named))

    with monkeypatch.context() as patched:
        patched.setattr(JITFunction, "run", record)
        call()
    return recorded


def compiled(kernel: Any, arguments: dict[str, Any], capability: int) -> Any:
    """What Triton makes of a launch: it looks for ones among the sizes and at the alignment of the rest."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    specialized = [parameter for parameter in kernel.params if not parameter.do_not_specialize]
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    ones = (name for name, value in arguments.items() if isinstance(value, int) and value == 1)
    constants |= {parameter.name for parameter in specialized} & set(ones)
    aligned = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in specialized
        if parameter.name not in constants
        if isinstance(value := arguments[parameter.name], Tensor) or value % 16 == 0
    }
    source = ASTSource(
        fn=kernel,
        signature={
            name: "constexpr" if name in constants else mangle_type(arguments[name]) for name in kernel.arg_names
        },
        constexprs={name: arguments[name] for name in constants},
        attrs=aligned,
    )
    options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Bytes a thread keeps in memory for want of registers."""
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Compile what a call launches for one GPU, and return its PTX."""

    def check(call: Callable[[], object], capability: int) -> str:
        recorded = launches(call, monkeypatch)
        assert recorded
        kernels = [compiled(kernel, arguments, capability) for kernel, arguments in recorded]
        for kernel in kernels:
            assert kernel.metadata.shared <= SHARED_MEMORY
            assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0
        return "\n".join(kernel.asm["ptx"] for kernel in kernels)

    return check


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("channels", "positions"), [(1280, 1), (768, 1), (320, 9)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_decoding(check, bits, channels, positions, capability):
    from diffusers_bitsfusion.ops.triton.decode import decode_triton

    columns = channels * positions
    width, row_bytes = -(-columns // digits_per_word(bits)), dense_width(columns, bits)
    codes, scale = torch.empty(320, row_bytes, dtype=torch.uint8), torch.empty(320)
    out = torch.empty(320, columns, dtype=torch.float16)
    ptx = check(lambda: decode_triton(codes, scale, bits, columns, out, positions), capability)
    # Neighbours of a warp store neighbours: what threads hold need not be moved between them first.
    assert "bar.sync" not in ptx
    if positions == 1 and all(size % 16 == 0 for size in (columns, width, row_bytes)):
        assert "st.global.v2.b32" in ptx and "st.global.b16" not in ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_decoding_within_the_product(check, bits, dtype, capability):
    from diffusers_bitsfusion.ops.triton.fused_linear import linear_fused

    codes, scale = torch.empty(1280, dense_width(320, bits), dtype=torch.uint8), torch.empty(1280)
    x, bias = torch.empty(2, 320, dtype=dtype), torch.empty(1280, dtype=dtype)
    ptx = check(lambda: linear_fused(x, codes, scale, bias, bits), capability)
    assert re.search(r"mma\.sync.*\.f32\." + {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype], ptx)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations(check, dtype, capability):
    from diffusers_bitsfusion.ops.triton.activations import quantize_image_triton, quantize_tokens_triton

    image = torch.empty(2, 320, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)
    for call in (
        lambda: quantize_tokens_triton(torch.empty(4, 320, dtype=dtype)),
        lambda: quantize_tokens_triton(torch.empty(4, 10240, dtype=dtype)),
        lambda: quantize_image_triton(image, (1, 1)),
    ):
        ptx = check(call, capability)
        assert "div.rn.f32" in ptx
        assert "fma." not in ptx  # which rounds once where the reference rounds twice


TILES = [(128, 128), (128, 64), (64, 128), (64, 64), (16, 64)]


@pytest.mark.parametrize(
    ("channels", "tile", "capability"),
    [*itertools.product((320, 4), TILES, CAPABILITIES), (320, (128, 256), 90)],
)
def test_integer_products(check, monkeypatch, channels, tile, capability):
    from diffusers_bitsfusion.ops.triton import int8_conv, int8_linear

    for module in (int8_linear, int8_conv):
        monkeypatch.setattr(module, "tile_of", lambda *_: tile)
    scale, bias = torch.empty(320), torch.empty(320, dtype=torch.float16)
    tokens, weight = torch.empty(256, channels, dtype=torch.int8), torch.empty(320, channels, dtype=torch.int8)
    image = torch.empty(2, channels, 18, 18, dtype=torch.int8).to(memory_format=torch.channels_last)
    kernel = torch.empty(320, 9, channels, dtype=torch.int8)
    geometry = (3, 3), (1, 1), (1, 1), 1
    zero_point, one = torch.empty(1, dtype=torch.int32), torch.empty(1)
    for call in (
        lambda: int8_linear.linear_triton(tokens, torch.empty(256), weight, scale, bias, torch.float16),
        lambda: int8_conv.conv2d_triton(image, one, zero_point, kernel, scale, bias, *geometry, torch.float16),
    ):
        ptx = check(call, capability)
        if capability == 90 and tile[0] >= 64:
            assert re.search(r"wgmma\.mma_async.*\.s32\.s8\.s8", ptx)
        else:
            assert re.search(r"mma\.sync.*\.s32\.s8\.s8\.s32", ptx)
        if channels % 16 == 0:  # operands go to shared memory sixteen bytes at a time, without waiting
            assert re.search(r"cp\.async\.cg\.shared\.global.*0x10", ptx)
