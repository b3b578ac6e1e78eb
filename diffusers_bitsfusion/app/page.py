"""The page: a prompt, both pictures, sizes, times and the difference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from diffusers import DiffusionPipeline

from ..codec.weight_files import weight_files
from ..reporting.size_report import MB, size_report
from . import drawing
from .models import Quantized, denoiser_folder, load, load_quantized, refuse_quantized

CSS = """
.picture { aspect-ratio: 1 }
.picture .image-container, .image-frame img { width: 100%; height: 100%; object-fit: contain }
.small img { image-rendering: pixelated }
.figures table { width: 100% }
.figures td, .figures th { overflow-wrap: normal !important; word-break: normal !important }
"""
LAUNCH: dict[str, Any] = {"show_error": True, "css": CSS}

Row = tuple[str, str, str, str]


def table(rows: Iterable[Row]) -> str:
    """A Markdown table of figures, full precision beside quantized."""
    lines = [("", "full", "quantized", ""), ("---",) * 4, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


class Contest:
    """Draws with the full-precision pipeline and with quantized ones.

    Args:
        folder: of the full-precision pipeline.
        pipeline: the same, loaded.
        quantized: what is compared with it.
    """

    def __init__(self, folder: Path, pipeline: DiffusionPipeline, quantized: Sequence[Quantized]):
        self.pipeline = pipeline
        self.quantized = {each.label: each for each in quantized}
        self.file_bytes = sum(file.stat().st_size for file in weight_files(denoiser_folder(folder)))
        self._warm: set[str] = set()

    def sizes(self, label: str) -> list[Row]:
        """The rows of the table that say how large both denoisers are."""
        chosen = self.quantized[label]
        packed, full = _denoiser(chosen.pipeline), _denoiser(self.pipeline)
        in_memory = size_report(packed)
        return [
            _size_row("UNet, file", self.file_bytes, chosen.report),
            _size_row("UNet, memory", full.get_memory_footprint(), in_memory),
        ]

    def generate(
        self,
        label: str,
        prompt: str,
        negative_prompt: str,
        seed: int | None,
        steps: int,
        guidance_scale: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple[Any, ...]]:
        """Yield both pictures, their difference and the table of figures, each as soon as it is there."""
        if seed is None:
            raise gr.Error("The seed is missing: a whole number, for the noise that both pictures start from.")
        arguments = {"prompt": prompt, "negative_prompt": negative_prompt, "num_inference_steps": steps}
        arguments["guidance_scale"] = guidance_scale
        sizes = self.sizes(label)
        quantized = self.quantized[label].pipeline
        self._warm_up("", self.pipeline, arguments)
        self._warm_up(label, quantized, arguments)

        yield None, None, None, table(sizes)
        a, a_time = drawing.draw(self.pipeline, seed, lambda *step: progress(step, desc="Full precision"), **arguments)
        yield a, None, None, table(sizes)
        b, b_time = drawing.draw(quantized, seed, lambda *step: progress(step, desc="Quantized"), **arguments)
        apart, psnr = drawing.difference(a, b)
        times = ("Time", f"{a_time:.2f} s", f"{b_time:.2f} s", f"{b_time / a_time:.2f} of full")
        shown = "∞" if math.isinf(psnr) else f"{psnr:.2f} dB"
        yield a, b, apart, table([*sizes, times, ("PSNR", "", "", shown)])

    def _warm_up(self, name: str, pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> None:
        if name not in self._warm:
            drawing.warm_up(pipeline, **arguments)
            self._warm.add(name)


def _denoiser(pipeline: DiffusionPipeline) -> Any:
    return getattr(pipeline, "unet", None) or pipeline.transformer


def _size_row(name: str, full: int, report: Any) -> Row:
    ratio = f"{full / report.total_bytes:.1f} times smaller"
    return name, f"{full / MB:.4g} MB", f"{report.total_bytes / MB:.4g} MB", ratio


def build_app(full: Path, *quantized: Path, examples: Sequence[str] = ()) -> gr.Blocks:
    """The page for a Stable Diffusion pipeline and quantized ones, all of which stay loaded.

    Args:
        full: folder of the pipeline in full precision.
        *quantized: folders of quantized pipelines, or of quantized UNets for the pipeline in `full`.
        examples: prompts to click.

    Raises:
        FileNotFoundError: a folder holds no UNet in safetensors files.
        ValueError: `full` is quantized, or one of `quantized` is not quantized by this package.
    """
    refuse_quantized(full)
    contest = Contest(full, load(full), [load_quantized(folder, full) for folder in quantized])
    labels = list(contest.quantized)
    pipeline = contest.pipeline
    pixels = _denoiser(pipeline).config.sample_size * pipeline.vae_scale_factor
    with gr.Blocks(title="Full precision beside quantized", analytics_enabled=False) as app:
        gr.Markdown(
            f"# Full precision beside quantized\n**{full.name}** in full precision, and quantized. Both pictures "
            "start from the same noise."
        )
        model = gr.Radio(labels, value=labels[0], label="Quantized model", visible=True)
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(label="Prompt", scale=4, min_width=320, value=examples[0] if examples else "")
            button = gr.Button("Generate", variant="primary")
        if examples:
            gr.Examples([[text] for text in examples], prompt, label="Prompts to try")
        with gr.Row():
            inputs = [
                model,
                prompt,
                gr.Textbox(label="Negative prompt"),
                gr.Number(label="Seed", value=0, minimum=0, maximum=2**32 - 1, precision=0),
                gr.Slider(label="Steps", value=25, minimum=1, maximum=100, step=1),
                gr.Slider(label="Guidance scale", value=7.5, minimum=0, maximum=20, step=0.5),
            ]
        with gr.Row():
            classes = ["picture", "small"] if pixels < 256 else ["picture"]
            look: dict[str, Any] = {"format": "png", "buttons": ["download", "fullscreen"], "elem_classes": classes}
            pictures = [
                gr.Image(label=label, interactive=False, **look)
                for label in ("Full precision", "Quantized", "Difference")
            ]
        figures = gr.Markdown(table(contest.sizes(labels[0])), elem_classes="figures")
        model.change(lambda label: table(contest.sizes(label)), model, figures)
        outputs = [*pictures, figures]
        gr.on([button.click, prompt.submit], contest.generate, inputs, outputs, show_progress_on=pictures[-1])
    return app
