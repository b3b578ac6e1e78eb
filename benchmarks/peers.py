"""Other packages that hold a UNet in few bits, measured on the same UNet and the same machine.

    python -m benchmarks.peers sdnq-uint2-row --source FP16_UNET --out DIR    one worker: one line of JSON
    python -m benchmarks.peers sdnq-uint2-row-load --source DIR
    python -m benchmarks.peers --source FP16_UNET --out DIR --peers-python PYTHON    all of them: a table

Peers are installed in an environment of their own (`pip install sdnq optimum-quanto torchao bitsandbytes gguf openvino
nncf onnx onnxscript onnxruntime`), and are used through their public interface only. Each worker runs in a fresh
process. All but SDNQ and OpenVINO leave Conv2d in fp16; ONNX Runtime quantizes nothing and computes in fp32 alone.
"""

import argparse
import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import gguf_unet, onnx_unet, openvino_unet
from benchmarks.measure import drop_page_cache, is_installed, measured_call, run_child, warm_page_cache

MB = 1e6


@dataclass(frozen=True)
class Peer:
    """A quantization package and the settings it is measured with: a config that diffusers takes while it loads, or
    for a format that diffusers reads alone, what writes it."""

    module: str
    distribution: str
    config: Callable[[], Any] | None = None
    needs_gpu: bool = False
    write: Callable[[Path, Path], None] | None = None

    def obstacle(self, python: str) -> str | None:
        """Why the interpreter `python` cannot run it here; None where it can."""
        if not is_installed(self.module, python):
            return "not installed"
        import torch

        return "needs a GPU" if self.needs_gpu and not torch.cuda.is_available() else None


def _sdnq(**settings: Any) -> Callable[[], Any]:
    def config() -> Any:
        from sdnq import SDNQConfig

        return SDNQConfig(quant_conv=True, **settings)

    return config


def _quanto_int2() -> Any:
    """The integration of diffusers, which quantizes Linear layers only."""
    from diffusers import QuantoConfig

    return QuantoConfig(weights_dtype="int2")


def _torchao(name: str) -> Callable[[], Any]:
    def config() -> Any:
        import torchao.quantization
        from diffusers import TorchAoConfig

        return TorchAoConfig(getattr(torchao.quantization, name)())

    return config


def _nf4() -> Any:
    import torch
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)


PEERS = {
    "sdnq-uint2-row": Peer("sdnq", "sdnq", _sdnq(weights_dtype="uint2", group_size=-1)),
    "sdnq-uint2-default": Peer("sdnq", "sdnq", _sdnq(weights_dtype="uint2")),
    "sdnq-uint4-row": Peer("sdnq", "sdnq", _sdnq(weights_dtype="uint4", group_size=-1)),
    "quanto-int2": Peer("optimum.quanto", "optimum-quanto", _quanto_int2),
    "torchao-int8": Peer("torchao", "torchao", _torchao("Int8WeightOnlyConfig")),
    "torchao-int8-dynamic": Peer("torchao", "torchao", _torchao("Int8DynamicActivationInt8WeightConfig")),
    "bitsandbytes-nf4": Peer("bitsandbytes", "bitsandbytes", _nf4, needs_gpu=True),
    "openvino": Peer("openvino", "openvino", write=openvino_unet.write),
    "openvino-int8": Peer("nncf", "nncf", write=functools.partial(openvino_unet.write, int8=True)),
    "onnxruntime": Peer("onnxruntime", "onnxruntime", write=onnx_unet.write),
    "gguf-q2_k": Peer("gguf", "gguf", write=functools.partial(gguf_unet.write, kind="Q2_K")),
    "gguf-q4_0": Peer("gguf", "gguf", write=functools.partial(gguf_unet.write, kind="Q4_0")),
}
LOAD = "-load"
WORKERS = ["fp16", *PEERS, *(name + LOAD for name in PEERS)]


def tensors(model: Any) -> Iterator[Any]:
    """The plain tensors behind a model's parameters and buffers; a tensor subclass is taken apart into its own."""

    def plain(tensor: Any) -> Iterator[Any]:
        if hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                yield from plain(getattr(tensor, name))
        else:
            yield tensor

    for tensor in [*model.parameters(), *model.buffers()]:
        yield from plain(tensor)


def resident_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers; of an OpenVINO or ONNX model those that it says."""
    if isinstance(model, (onnx_unet.ONNXUNet, openvino_unet.OpenVINOUNet)):
        return model.resident_bytes
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(model))


def read_weights(model: Any) -> None:
    """Read every byte of a model's parameters and buffers, at memory speed whatever their dtype."""
    import torch

    for tensor in tensors(model):
        octets = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        octets[: octets.size // 8 * 8].view("uint64").sum()


def file_bytes(path: Path) -> int:
    """Bytes of the weight files of a saved model."""
    return sum(file.stat().st_size for file in path.iterdir() if file.suffix in {".safetensors", ".bin", ".gguf"})


def load_unet(path: Path, dtype: Any) -> Any:
    """The UNet saved at `path`, by whichever package."""
    from diffusers import UNet2DConditionModel

    if (path / gguf_unet.FILE).exists():
        return gguf_unet.read(path, dtype)
    if (path / openvino_unet.FILE).exists():
        return openvino_unet.OpenVINOUNet(path, dtype)
    if (path / onnx_unet.FILE).exists():
        return onnx_unet.ONNXUNet(path)
    return UNet2DConditionModel.from_pretrained(path, dtype=dtype)


def quantize(source: Path, out: Path, peer: Peer) -> dict[str, Any]:
    """Quantize the fp16 UNet at `source` while loading it, and save it to `out`; or write it there and load it."""
    import torch
    from diffusers import UNet2DConditionModel

    start = time.perf_counter()
    if peer.config is None:
        peer.write(source, out)
        quantized = saved = time.perf_counter()
        unet = load_unet(out, torch.float16)
    else:
        unet = UNet2DConditionModel.from_pretrained(source, dtype=torch.float16, quantization_config=peer.config())
        quantized = time.perf_counter()
        unet.save_pretrained(out)
        saved = time.perf_counter()
    return {
        "version": version(peer.distribution),
        "quantize_seconds": quantized - start,
        "save_seconds": saved - quantized,
        "resident_bytes": resident_bytes(unet),
        "file_bytes": file_bytes(out),
    }


def load(source: Path) -> dict[str, Any]:
    """Load the UNet saved at `source`, then read each of its weights once: a memory map alone loads nothing."""
    import torch

    start = time.perf_counter()
    unet = load_unet(source, torch.float16)
    loaded = time.perf_counter()
    read_weights(unet)
    return {
        "load_seconds": loaded - start,
        "read_seconds": time.perf_counter() - loaded,
        "resident_bytes": resident_bytes(unet),
        "file_bytes": file_bytes(source),
    }


def run_worker(worker: str, source: Path, out: Path | None) -> dict[str, Any]:
    """Run one worker in this process."""
    importlib.import_module("diffusers.models.unets.unet_2d_condition")
    peer = PEERS.get(worker.removesuffix(LOAD))
    if peer:
        importlib.import_module(peer.module)
    if peer and not worker.endswith(LOAD):
        return measured_call(quantize, source, out, peer)
    return measured_call(load, source)


def measure_peers(source: Path, out: Path, python: str = sys.executable) -> dict[str, dict[str, Any] | str]:
    """Run all workers, each in a fresh process of the interpreter `python`, files read from a warm page cache.

    The fp16 UNet is loaded from a cold cache too, as `fp16-cold`. Of a peer that cannot run, the reason is given.
    """

    def run(worker: str, path: Path) -> dict[str, Any]:
        arguments = ["-m", "benchmarks.peers", worker, "--source", str(path), "--out", str(out / worker)]
        return run_child(arguments, python)

    source, out = source.resolve(), out.resolve()
    drop_page_cache(source)
    results: dict[str, dict[str, Any] | str] = {"fp16-cold": run("fp16", source)}
    warm_page_cache(source)
    results["fp16"] = run("fp16", source)
    for name, peer in PEERS.items():
        obstacle = peer.obstacle(python)
        if obstacle is not None:
            results[name] = obstacle
            continue
        warm_page_cache(source)
        results[name] = run(name, source)
        warm_page_cache(out / name)
        results[name + LOAD] = run(name + LOAD, out / name)
    return results


def table(results: dict[str, dict[str, Any] | str]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| | file, MB | resident, MB | quantize, s | load + read, s | peak memory, MB | over imports, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        if isinstance(result, str):
            lines.append(f"| {name} | {result} | | | | | |")
            continue
        quantized = f"{result['quantize_seconds']:.1f}" if "quantize_seconds" in result else ""
        read = f"{result['load_seconds']:.1f} + {result['read_seconds']:.1f}" if "load_seconds" in result else ""
        file, resident, peak, over = (
            f"{result[key] / MB:.1f}" for key in ("file_bytes", "resident_bytes", "peak_rss", "peak_over_imports")
        )
        lines.append(f"| {name} | {file} | {resident} | {quantized} | {read} | {peak} | {over} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure other quantization packages on a UNet saved in fp16.")
    parser.add_argument("worker", nargs="?", choices=WORKERS, help="run this one here; without it, run all")
    parser.add_argument("--source", type=Path, required=True, help="the fp16 UNet, or for a load worker what to load")
    parser.add_argument("--out", type=Path, help="directory to save to")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers installed")
    arguments = parser.parse_args()
    if arguments.out is None and not (arguments.worker == "fp16" or (arguments.worker or "").endswith(LOAD)):
        parser.error("--out is needed to save to")
    if arguments.worker is None:
        print(table(measure_peers(arguments.source, arguments.out, arguments.peers_python)))
        return
    result = run_worker(arguments.worker, arguments.source, arguments.out)
    print(json.dumps({"worker": arguments.worker, **result}))


if __name__ == "__main__":
    main()
