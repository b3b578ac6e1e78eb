"""Full precision beside quantized, in the browser: both pictures, sizes, times and the difference.

    python examples/app.py --pipeline PATH_OR_ID --quantized PATH_OR_ID

Without --quantized the pipeline is quantized at the start, without --pipeline it is the one of demo.py. As a Space,
where nobody gives arguments, the variables APP_PIPELINE and APP_QUANTIZED name them (docs/USING.md).
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops

from diffusers_bitsfusion import BitsFusionConfig, size_report
from diffusers_bitsfusion.codec.weight_files import weight_files
from diffusers_bitsfusion.reporting.size_report import MB, SizeReport

CSS = """
.picture { aspect-ratio: 1 }
.picture .image-container, .image-frame img { width: 100%; height: 100%; object-fit: contain }
.small img { image-rendering: pixelated }
.figures table { width: 100% }
.figures td, .figures th { overflow-wrap: normal !important; word-break: normal !important }
"""
LAUNCH = {"show_error": True, "css": CSS}


def fetch(source: str) -> Path:
    """The folder of a pipeline, downloaded where `source` is a Hub id."""
    return Path(source) if Path(source).is_dir() else Path(DiffusionPipeline.download(source))


def quantize(source: Path, folder: Path, target_bits: float) -> Path:
    """Save the pipeline in `source` quantized, in `folder`."""
    config = BitsFusionConfig(target_bits=target_bits)
    DiffusionPipeline.from_pretrained(source, quantization_config=config, dtype=torch.float16).save_pretrained(folder)
    return folder


def load(folder: Path) -> DiffusionPipeline:
    """In fp16 on the GPU where there is one, else in fp32 on the CPU."""
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: DiffusionPipeline, seed: int, on_step: Callable[[int, int], None], **arguments
) -> tuple[Image.Image, float]:
    """A picture, and the seconds that it took.

    Args:
        seed: of the noise to start from, drawn on the CPU: the same noise for every pipeline.
        on_step: called after each denoising step with its number, from 1, and the number of all.
        arguments: of the pipeline's call.
    """

    def after_step(pipe: DiffusionPipeline, step: int, timestep: int, tensors: dict) -> dict:
        on_step(step + 1, pipe.num_timesteps)
        return tensors

    start = time.perf_counter()
    generator = torch.Generator("cpu").manual_seed(seed)
    image = pipe(generator=generator, callback_on_step_end=after_step, **arguments).images[0]
    return image, time.perf_counter() - start


def difference(a: Image.Image, b: Image.Image) -> tuple[Image.Image, float]:
    """The absolute difference of two RGB pictures, and their PSNR in dB: infinite where they are equal.

    Raises:
        ValueError: they differ in size.
    """
    if a.size != b.size:
        raise ValueError(f"Pictures of {a.size} and {b.size} pixels cannot be compared: take pipelines of one size.")
    picture = ImageChops.difference(a, b)
    mse = np.square(np.asarray(picture, np.float64)).mean()
    return picture, 10 * math.log10(255**2 / mse) if mse else math.inf


def table(rows: Iterable[tuple[str, str, str, str]]) -> str:
    lines = [("", "full", "quantized", ""), ("---",) * 4, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def size_row(name: str, full: int, report: SizeReport) -> tuple[str, str, str, str]:
    return name, f"{full / MB:.4g} MB", f"{report.total_bytes / MB:.4g} MB", f"1/{report.ratio:.2f} of fp16"


def build_app(full: Path, quantized: Path) -> gr.Blocks:
    """The page for two Stable Diffusion pipelines in folders, both of which stay loaded.

    Raises:
        FileNotFoundError: a folder holds no UNet in safetensors files.
        ValueError: the UNet in `quantized` is not quantized by this package.
    """
    full_bytes = sum(file.stat().st_size for file in weight_files(full / "unet"))
    report = size_report(quantized / "unet")
    full_pipe, quantized_pipe = load(full), load(quantized)
    sizes = [
        size_row("UNet, file", full_bytes, report),
        size_row("UNet, memory", full_pipe.unet.get_memory_footprint(), size_report(quantized_pipe.unet)),
    ]

    def generate(prompt, negative_prompt, seed, steps, guidance_scale, progress=gr.Progress()):  # noqa: B008
        if seed is None:
            raise gr.Error("The seed is missing: a whole number, for the noise that both pictures start from.")
        arguments = {"prompt": prompt, "negative_prompt": negative_prompt, "num_inference_steps": steps}
        arguments["guidance_scale"] = guidance_scale

        yield None, None, None, table(sizes)
        a, a_time = draw(full_pipe, seed, lambda *step: progress(step, desc="Full precision"), **arguments)
        yield a, None, None, table(sizes)
        b, b_time = draw(quantized_pipe, seed, lambda *step: progress(step, desc="Quantized"), **arguments)
        apart, psnr = difference(a, b)
        times = ("Time", f"{a_time:.2f} s", f"{b_time:.2f} s", f"{b_time / a_time:.2f} of full")
        yield a, b, apart, table([*sizes, times, ("PSNR", "", "", f"{psnr:.2f} dB")])

    pixels = full_pipe.unet.config.sample_size * full_pipe.vae_scale_factor
    with gr.Blocks(title="Full precision beside quantized", analytics_enabled=False) as app:
        gr.Markdown(
            "# Full precision beside quantized\nBoth pictures start from the same noise. The quantized UNet's file "
            f"takes {report.real_bits:.2f} bits a weight, everything in it counted."
        )
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(label="Prompt", scale=4, min_width=320)
            button = gr.Button("Generate", variant="primary")
        with gr.Row():
            inputs = [
                prompt,
                gr.Textbox(label="Negative prompt"),
                gr.Number(label="Seed", value=0, minimum=0, maximum=2**32 - 1, precision=0),
                gr.Slider(label="Steps", value=25, minimum=1, maximum=100, step=1),
                gr.Slider(label="Guidance scale", value=7.5, minimum=0, maximum=20, step=0.5),
            ]
        with gr.Row():
            classes = ["picture", "small"] if pixels < 256 else ["picture"]
            look = {"format": "png", "buttons": ["download", "fullscreen"], "elem_classes": classes}
            pictures = [
                gr.Image(label=label, interactive=False, **look)
                for label in ("Full precision", "Quantized", "Difference")
            ]
        figures = gr.Markdown(table(sizes), elem_classes="figures")
        gr.on([button.click, prompt.submit], generate, inputs, [*pictures, figures], show_progress_on=pictures[-1])
    return app


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    environ = os.environ.get
    parser.add_argument("--pipeline", default=environ("APP_PIPELINE"), help="folder or Hub id, in full precision")
    parser.add_argument("--quantized", default=environ("APP_QUANTIZED"), help="folder or Hub id, quantized")
    parser.add_argument("--target-bits", type=float, default=3.0, help="without --quantized: bits a weight to aim at")
    parser.add_argument("--server-port", type=int, help="7860, or the next free one")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.pipeline is None:
            from demo import SHAPES  # here: with pipelines of its own a Space needs this file alone

            full = SHAPES
        else:
            full = fetch(arguments.pipeline)
        if arguments.quantized is None:
            quantized = quantize(full, Path(scratch, "quantized"), arguments.target_bits)
        else:
            quantized = fetch(arguments.quantized)
        app = build_app(full, quantized)
    app.launch(server_port=arguments.server_port, **LAUNCH)


if __name__ == "__main__":
    main()
