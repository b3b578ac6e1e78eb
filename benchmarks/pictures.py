"""Whole pictures on a CPU: seconds a picture and peak memory, beside torch and OpenVINO; each in a process of its own.

    python -m benchmarks.pictures --work DIR [--openvino-python PYTHON] [--optimum-python PYTHON]
        [--dtype bfloat16|float32] [--steps 20] [--repeats 1] [--only NAME ...] [--tiny]

A pipeline of Stable Diffusion 1.5's shape (text encoder, UNet, VAE) with random weights is built in DIR (5 GB) on the
first run. OPENVINO-PYTHON exports it and needs this package with openvino and nncf; OPTIMUM-PYTHON draws with what was
exported and needs optimum-intel alone. One picture of one step is drawn first and not counted: engines compile then.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import peak_rss, run_child, warm_page_cache

MB = 1e6
PROMPT = "ab"
CALIBRATION_CALLS = 4
# Names of contestants: the folder each loads, and the environment it runs in.
CONTESTANTS = {
    "torch": ("plain", "own"),
    "bitsfusion exact": ("packed", "own"),
    "bitsfusion int8": ("packed", "own"),
    "openvino": ("openvino", "optimum"),
    "openvino int8": ("openvino-int8", "optimum"),
    "bitsfusion exported": ("packed-openvino", "optimum"),
}
HINTS = {"bfloat16": "bf16", "float32": "f32"}


def build_plain(out: Path, tiny: bool) -> None:
    """Save the pipeline of random weights in fp16."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from benchmarks.sd15_shape import random_unet

    width, layers, channels = (32, 2, (16, 16)) if tiny else (768, 12, (128, 256, 512, 512))
    unet = random_unet(shape="tiny" if tiny else "sd15")
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        tokens = ["a", "b", "a</w>", "b</w>", "ab", "<|startoftext|>", "<|endoftext|>"]
        vocabulary.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\na b\n")
        tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokens) if tiny else 49408,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // 16 if tiny else 12,
                projection_dim=width,
                bos_token_id=5,
                eos_token_id=6,
                pad_token_id=6,
            )
        )
        vae = AutoencoderKL(
            block_out_channels=channels,
            layers_per_block=1 if tiny else 2,
            norm_num_groups=8 if tiny else 32,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            latent_channels=4,
            sample_size=unet.config.sample_size * 2 ** (len(channels) - 1),
        )
        scheduler = PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        )
        pipeline = StableDiffusionPipeline(
            vae.half(), text_encoder.half(), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        )
        pipeline.save_pretrained(out)


def build_packed(plain: Path, out: Path) -> None:
    """Quantize the UNet by the default config."""
    import torch
    from diffusers import StableDiffusionPipeline

    from diffusers_bitsfusion import BitsFusionConfig

    pipeline = StableDiffusionPipeline.from_pretrained(
        plain, dtype=torch.float16, quantization_config=BitsFusionConfig()
    )
    pipeline.save_pretrained(out)


def export(source: Path, out: Path) -> None:
    """Export a pipeline, packed or not, to OpenVINO."""
    import torch
    from diffusers import StableDiffusionPipeline

    from diffusers_bitsfusion.export import export_openvino

    export_openvino(StableDiffusionPipeline.from_pretrained(source, dtype=torch.float32), out)


def quantize_openvino(source: Path, out: Path) -> None:
    """Quantize the UNet of an exported pipeline to int8, with smooth quantization."""
    import nncf
    import numpy as np
    import openvino

    shutil.copytree(source, out, ignore=lambda folder, names: ["openvino_model.bin"] if "unet" in folder else [])
    config = json.loads((source / "unet" / "config.json").read_text())
    generator, side = np.random.default_rng(0), config["sample_size"]
    calls = [
        {
            "sample": generator.standard_normal((2, config["in_channels"], side, side), np.float32),
            "timestep": np.float32(number * 900 // CALIBRATION_CALLS + 1),
            "encoder_hidden_states": generator.standard_normal((2, 77, config["cross_attention_dim"]), np.float32),
        }
        for number in range(CALIBRATION_CALLS)
    ]
    model = openvino.Core().read_model(source / "unet" / "openvino_model.xml")
    quantized = nncf.quantize(
        model, nncf.Dataset(calls), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calls)
    )
    openvino.save_model(quantized, out / "unet" / "openvino_model.xml", compress_to_fp16=True)


def load(name: str, folder: Path, dtype: str) -> Any:
    """The pipeline of a contestant, ready to draw."""
    import torch

    if CONTESTANTS[name][1] == "optimum":
        from optimum.intel import OVStableDiffusionPipeline

        hints = {
            "INFERENCE_PRECISION_HINT": HINTS[dtype],
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            "PERFORMANCE_HINT": "LATENCY",
        }
        pipeline = OVStableDiffusionPipeline.from_pretrained(folder, compile=False, ov_config=hints)
        side = pipeline.unet.config["sample_size"] * 2 ** (len(pipeline.vae_decoder.config["block_out_channels"]) - 1)
        pipeline.reshape(batch_size=1, height=side, width=side, num_images_per_prompt=1)
        pipeline.compile()
        return pipeline
    from diffusers import StableDiffusionPipeline

    if name.startswith("bitsfusion"):
        from diffusers_bitsfusion import set_compute
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    if name.startswith("bitsfusion"):
        set_compute(pipeline.unet, name.removeprefix("bitsfusion "))
    return pipeline


def draw(name: str, folder: Path, dtype: str, steps: int, repeats: int) -> dict[str, Any]:
    """Load a contestant and draw: seconds of loading, of each picture, and the most memory."""
    import torch

    start = time.perf_counter()
    pipeline = load(name, folder, dtype)
    loaded = time.perf_counter() - start
    pipeline.set_progress_bar_config(disable=True)
    pipeline(PROMPT, num_inference_steps=1, output_type="np")
    seconds = []
    for number in range(repeats):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(number)
        pipeline(PROMPT, num_inference_steps=steps, generator=generator, output_type="np")
        seconds.append(time.perf_counter() - start)
    return {"load_seconds": loaded, "seconds": seconds, "peak_bytes": peak_rss()}


WORKERS: dict[str, Callable[..., Any]] = {
    "plain": build_plain,
    "packed": build_packed,
    "export": export,
    "quantize": quantize_openvino,
    "draw": draw,
}


def prepare(work: Path, folder: str, openvino_python: str, tiny: bool) -> Path:
    """Build the folder of a contestant unless it is there, and what it is made of before; it appears when complete."""
    out = work / folder
    if out.exists():
        return out
    sources = {"packed": "plain", "openvino": "plain", "openvino-int8": "openvino", "packed-openvino": "packed"}
    partial = work / f"{folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if folder == "plain":
        arguments, python = ["plain", str(partial), tiny], sys.executable
    else:
        source = prepare(work, sources[folder], openvino_python, tiny)
        worker = {"packed": "packed", "openvino-int8": "quantize"}.get(folder, "export")
        arguments = [worker, str(source), str(partial)]
        python = sys.executable if folder == "packed" else openvino_python
    run_worker(python, *arguments)
    partial.replace(out)
    return out


def run_worker(python: str, *arguments: Any) -> dict[str, Any]:
    """Run a worker in a process of its own, and return what it returns."""
    return run_child(["-m", "benchmarks.pictures", "--worker", json.dumps(arguments)], python)


def work_here(name: str, *arguments: Any) -> None:
    """Run a worker in this process and print what it returns; folders are told by their slash."""
    given = [Path(value) if isinstance(value, str) and "/" in value else value for value in arguments]
    result = WORKERS[name](*given)
    print(json.dumps(result or {}))


def folder_bytes(folder: Path) -> int:
    """Bytes of the weights in a folder of a pipeline."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in (".safetensors", ".bin"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for models")
    parser.add_argument("--openvino-python", default=sys.executable)
    parser.add_argument("--optimum-python", default=sys.executable)
    parser.add_argument("--dtype", choices=HINTS, default="bfloat16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1, help="pictures that are timed")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--tiny", action="store_true", help="small models of no real shape: a dry run")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work_here(*json.loads(arguments.worker))
        return
    if arguments.work is None:
        parser.error("--work is needed")
    work = arguments.work.resolve() / ("tiny" if arguments.tiny else "sd15")
    work.mkdir(parents=True, exist_ok=True)
    folders = {
        name: prepare(work, CONTESTANTS[name][0], arguments.openvino_python, arguments.tiny) for name in arguments.only
    }
    print("| | files, MB | load, s | seconds a picture | peak, MB |\n|---|---|---|---|---|")
    for name, folder in folders.items():
        python = arguments.optimum_python if CONTESTANTS[name][1] == "optimum" else sys.executable
        warm_page_cache(folder)
        drawn = run_worker(python, "draw", name, str(folder), arguments.dtype, arguments.steps, arguments.repeats)
        cells = [f"{folder_bytes(folder) / MB:.0f}", f"{drawn['load_seconds']:.1f}"]
        cells += [f"{statistics.median(drawn['seconds']):.2f}", f"{drawn['peak_bytes'] / MB:.0f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
