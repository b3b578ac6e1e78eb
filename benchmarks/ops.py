"""Rates of each operation at the shapes of Stable Diffusion 1.5, beside the ceiling measured in the same run.

    python -m benchmarks.ops [decode] [linear] [conv] [norm] [--repeats 7] [--device cpu|cuda] [--batch 2]

Decoding is compared with a `copy_` that writes the same bytes, layers with torch's own on float weights. All variants
of one shape take turns, so that the machine's drift cancels; medians are shown. On a GPU a variant is a CUDA graph of
many calls, so that what is timed is the device's work and not the launches. On a CPU without instructions for bf16,
which would take several times as long as fp32, layers are timed in fp32 alone; where it lacks VNNI as well, integer
products of this package's loops are compared with oneDNN's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import statistics
import time
import unittest.mock
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from diffusers_bitsfusion.codec.grid import half_range
from diffusers_bitsfusion.codec.radix import pack_dense
from diffusers_bitsfusion.nn import PackedWeight
from diffusers_bitsfusion.nn.conversion import packed_from_float
from diffusers_bitsfusion.ops.decode import decode, decode_channels_last
from diffusers_bitsfusion.ops.dispatch import multiplies_blocks
from diffusers_bitsfusion.ops.kernels import has_bf16
from diffusers_bitsfusion.ops.norms import group_norm, group_norm_reference

# (rows, channels, positions) of weights: a transformer's, and the two most common of the wide convolutions.
DECODED = [(1280, 1280, 1), (640, 640, 9), (1280, 1280, 9)]
# (tokens, in, out) at `BATCH` and 64×64 latents.
LINEARS = [
    (8192, 320, 320),
    (8192, 320, 2560),
    (2048, 640, 640),
    (512, 1280, 1280),
    (512, 1280, 10240),
    (154, 768, 320),
]
# (channels in, channels out, height and width of the image, kernel).
CONVS = [
    (320, 320, 64, 3),
    (640, 640, 32, 3),
    (1280, 1280, 16, 3),
    (2560, 1280, 16, 3),
    (1280, 1280, 8, 3),
    (640, 320, 64, 1),
]
# (channels, height and width of the image) of norms in residual blocks.
NORMS = [(320, 64), (640, 32), (960, 64), (1280, 16), (1280, 32), (2560, 16), (1280, 8)]
BATCH = 2
GRAPH_CALLS = 20


def packed_codes(rows: int, columns: int, bits: int, device: str) -> tuple[Tensor, Tensor]:
    """Random codes in dense form, and scales near those of weights."""
    half = half_range(bits)
    codes = torch.randint(-half, half + 1, (rows, columns), dtype=torch.int8)
    return pack_dense(codes, bits).to(device), torch.rand(rows, device=device) * 0.02


def recorded(variant: Callable[[], object]) -> Callable[[], object]:
    """`GRAPH_CALLS` calls as one CUDA graph, which waits for them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what is compiled or allocated once must not be recorded
        for _ in range(3):
            variant()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            variant()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def interleaved(variants: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each variant, all in turn; the first round is not counted."""
    calls = 1
    if device == "cuda":
        variants, calls = {name: recorded(variant) for name, variant in variants.items()}, GRAPH_CALLS
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(repeats + 1):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            if round_number:
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def decoding_call(shape: tuple[int, int, int], bits: int, out: Tensor) -> Callable[[], object]:
    """A call that decodes as layers do: on a GPU convolutions channels last."""
    rows, channels, positions = shape
    codes, scale = packed_codes(rows, channels * positions, bits, out.device.type)
    if out.device.type == "cuda" and positions > 1:
        side = math.isqrt(positions)
        return lambda: decode_channels_last(codes, scale, bits, (rows, channels, side, side), out.dtype)
    return lambda: decode(codes, scale, bits, out.shape[1], out)


def decoding(repeats: int, device: str, half: torch.dtype) -> None:
    print("| weights | into | " + " | ".join(f"{2**bits + 1} levels" for bits in (1, 2, 3, 4)) + " | `copy_` |")
    print("|---|---|---|---|---|---|---|")
    for rows, channels, positions in DECODED:
        columns = channels * positions
        for dtype in (torch.float32, half, torch.int8):
            out = torch.empty(rows, columns, dtype=dtype, device=device)
            source = torch.zeros_like(out)
            variants: dict[str, Callable[[], object]] = {"copy": lambda out=out, source=source: out.copy_(source)}
            for bits in (1, 2, 3, 4):
                variants[str(bits)] = decoding_call((rows, channels, positions), bits, out)
            rates = {name: out.numel() / taken / 1e9 for name, taken in interleaved(variants, repeats, device).items()}
            cells = [f"{rates[str(bits)]:.1f} ({rates[str(bits)] / rates['copy']:.0%})" for bits in (1, 2, 3, 4)]
            name = str(dtype).removeprefix("torch.")
            print(f"| {rows}×{columns} | {name} | {' | '.join(cells)} | {rates['copy']:.1f} |", flush=True)
    print("\nGweights a second, and the share of `copy_`'s.\n")


def packed_layer(layer: nn.Linear | nn.Conv2d, bits: int, device: str) -> PackedWeight:
    packed = packed_from_float(layer, bits, torch.float32)
    packed.set_codes(*packed_codes(packed.weight_shape[0], packed.columns, bits, device))
    return packed.requires_grad_(False)


def layer_variants(
    layer: nn.Linear | nn.Conv2d, x: Tensor, half: torch.dtype, bits: int
) -> dict[str, Callable[[], object]]:
    """Calls of a float layer in both dtypes, and of its packed layers in every arithmetic."""
    device = x.device.type
    layer = layer.to(device).requires_grad_(False)
    packed = packed_layer(layer, bits, device)
    inputs = {"fp32": x, "half": x.to(half)} if has_bf16(x.device) else {"fp32": x}
    variants: dict[str, Callable[[], object]] = {}
    for dtype, given in inputs.items():
        plain = copy.deepcopy(layer).to(given.dtype)
        variants[dtype] = lambda plain=plain, given=given: plain(given)

    def computing(compute: str, resident: str) -> PackedWeight:
        made = packed_from_float(layer, bits, torch.float32)
        made.set_codes(packed.codes.data, packed.scale_bits.view(torch.float32))
        made.set_compute(compute, resident)
        return made

    for compute, resident in (("exact", "packed"), ("int8", "packed"), ("int8", "int8")):
        made = computing(compute, resident)
        name = f"{compute} {'resident' if resident == 'int8' else ''}".strip()
        for dtype, given in inputs.items():
            variants[f"{name} {dtype}"] = lambda made=made, given=given: made(given)
    if isinstance(layer, nn.Conv2d) and multiplies_blocks(x.device, bits):
        with by_onednn():
            laid_out = computing("int8", "int8")
        variants["int8 resident fp32, by oneDNN"] = by_onednn()(lambda: laid_out(x))
    return variants


@contextlib.contextmanager
def by_onednn() -> Iterator[None]:
    """Convolve in integers by oneDNN, as on a processor with VNNI."""
    with unittest.mock.patch.object(torch.cpu, "_is_vnni_supported", return_value=True):
        yield


def print_layers(
    cases: dict[str, tuple[nn.Linear | nn.Conv2d, Tensor, float]], repeats: int, half: torch.dtype
) -> None:
    """A table of GFLOP/s; cases hold a layer, its input and its floating-point operations."""
    header = False
    for name, (layer, x, operations) in cases.items():
        with torch.no_grad():
            seconds = interleaved(layer_variants(layer, x, half, bits=2), repeats, x.device.type)
        if not header:
            print(f"| shape | {' | '.join(seconds)} |\n|---|{'---|' * len(seconds)}")
            header = True
        print(
            f"| {name} | " + " | ".join(f"{operations / taken / 1e9:.0f}" for taken in seconds.values()) + " |",
            flush=True,
        )
    print(
        f"\nGFLOP/s; packed layers of 2 bits; half precision, where it is timed, {str(half).removeprefix('torch.')}.\n"
    )


@torch.no_grad()
def norms(repeats: int, batch: int) -> None:
    """A table of the norm of a residual block with the sum before and the SiLU after it, by torch and by the loops."""
    print("| image, fp32, channels last | torch, ms | compiled, ms | of torch |\n|---|---|---|---|")
    for channels, size in NORMS:
        x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
        weight, bias, shift = (torch.randn(shape) for shape in (channels, channels, (batch, channels)))
        arguments = (x, 32, weight, bias, 1e-5, True, shift)
        seconds = interleaved(
            {
                "torch": lambda arguments=arguments: group_norm_reference(*arguments),
                "compiled": lambda arguments=arguments: group_norm(*arguments),
            },
            repeats,
            "cpu",
        )
        of_torch, compiled = seconds["torch"], seconds["compiled"]
        row = f"{of_torch * 1e3:.2f} | {compiled * 1e3:.2f} | {compiled / of_torch:.2f}"
        print(f"| {channels} channels at {size}×{size} | {row} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sections = ["decode", "linear", "conv", "norm"]
    parser.add_argument(
        "sections", nargs="*", default=sections, help=f"of {', '.join(sections)}, norms on a CPU alone; default: all"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=BATCH)
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(sections):  # argparse refuses a default list beside choices
        parser.error(f"unknown section: {', '.join(sorted(unknown))}")
    half = torch.float16 if arguments.device == "cuda" else torch.bfloat16
    device, repeats, batch = arguments.device, arguments.repeats, arguments.batch
    if "decode" in arguments.sections:
        decoding(repeats, device, half)
    if "linear" in arguments.sections:
        cases = {
            f"{tokens} tokens, {inputs} to {outputs}": (
                nn.Linear(inputs, outputs),
                torch.randn(tokens, inputs, device=device),
                2.0 * tokens * inputs * outputs,
            )
            for tokens, inputs, outputs in ((batch * rows // BATCH, *sizes) for rows, *sizes in LINEARS)
        }
        print_layers(cases, repeats, half)
    if "conv" in arguments.sections:
        cases = {
            f"{inputs} to {outputs} at {size}×{size}, {kernel}×{kernel}": (
                nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2),
                torch.randn(batch, inputs, size, size, device=device),
                2.0 * batch * inputs * outputs * kernel**2 * size**2,
            )
            for inputs, outputs, size, kernel in CONVS
        }
        print_layers(cases, repeats, half)
    if "norm" in arguments.sections and device == "cpu":
        norms(repeats, batch)


if __name__ == "__main__":
    main()
