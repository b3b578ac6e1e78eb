"""One contestant of benchmarks/inference.py: loads its UNet, then times one call for every request on its input.

Runs in an interpreter of its own, which may lack this package (peers). Speaks in lines of JSON on standard output,
each after a mark that no library prints.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import peak_rss
from benchmarks.peers import PEERS, file_bytes, load_unet, read_weights, resident_bytes

MARK = "@@benchmark "


def say(**content: Any) -> None:
    print(MARK + json.dumps(content), flush=True)


def import_packages(arguments: argparse.Namespace) -> None:
    """Import what loading needs, which is no part of its time; a peer's package registers its method so."""
    importlib.import_module("diffusers.models.unets.unet_2d_condition")
    if arguments.peer is not None:
        importlib.import_module(PEERS[arguments.peer].module)
    if arguments.compute is not None:
        importlib.import_module("diffusers_bitsfusion")
    if arguments.no_compiler:
        shutil.which = lambda *_, **__: None


def load(arguments: argparse.Namespace) -> Any:
    """The UNet, computing as asked."""
    import torch

    unet = load_unet(arguments.model, getattr(torch, arguments.dtype))
    unet = unet.eval().requires_grad_(False).to(arguments.device)
    if arguments.compute is not None:
        from diffusers_bitsfusion import set_compute

        set_compute(unet, arguments.compute, arguments.resident)
    return unet


def inputs(unet: Any, size: int, batch: int) -> dict[str, Any]:
    """Random inputs of a call at `size` × `size` latents, in the model's dtype and on its device."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def random_normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(unet.device, unet.dtype)

    config = unet.config
    call = {
        "sample": random_normal(batch, config.in_channels, size, size),
        "timestep": torch.tensor(501, device=unet.device),
        "encoder_hidden_states": random_normal(batch, 77, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        call["added_cond_kwargs"] = {"text_embeds": random_normal(batch, 1280), "time_ids": random_normal(batch, 6)}
    return call


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call, to its end on the device."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(device: str) -> int:
    """Bytes at the most: of this process on a CPU, of torch's allocator on a GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return peak_rss()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the saved UNet")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--peer", choices=PEERS, help="whose package reads the UNet")
    parser.add_argument("--compute", help="for UNets of this package; see set_compute")
    parser.add_argument("--resident", default="packed")
    parser.add_argument("--no-compiler", action="store_true", help="as on a machine without a C compiler")
    parser.add_argument("--compiled", action="store_true", help="through torch.compile")
    arguments = parser.parse_args()

    import torch

    import_packages(arguments)
    start = time.perf_counter()
    unet = load(arguments)
    read_weights(unet) if arguments.device == "cpu" else torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    kept = 0
    if arguments.compute is not None:
        from diffusers_bitsfusion import size_report

        kept = size_report(unet).parts["int8 codes kept for compute"]
    say(load_seconds=seconds, file_bytes=file_bytes(arguments.model), resident_bytes=resident_bytes(unet) + kept)
    if arguments.compiled:
        mode = "reduce-overhead" if arguments.device == "cuda" else None
        unet.compile(fullgraph=arguments.compute is not None, dynamic=False, mode=mode)
    for line in sys.stdin:
        call = inputs(unet, int(line), arguments.batch)
        with torch.no_grad():
            seconds = timed(lambda call=call: unet(**call), arguments.device)
        say(seconds=seconds, peak_bytes=peak_memory(arguments.device))


if __name__ == "__main__":
    main()
