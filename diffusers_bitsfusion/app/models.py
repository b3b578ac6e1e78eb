"""The pipelines of the page: found, named and loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from ..config.bitsfusion import BitsFusionConfig
from ..evaluation.pipeline import DENOISERS, check_pipeline, default_device, default_dtype, load_pipeline
from ..reporting.model_card import origin
from ..reporting.report_types import SizeReport
from ..reporting.size_report import size_report
from ..utils.json_files import read_json


@dataclass(frozen=True)
class Quantized:
    """A quantized pipeline, or a quantized UNet or transformer for the full-precision pipeline.

    Attributes:
        folder: where it is saved.
        pipeline: loaded, ready to sample.
        report: of the denoiser's file.
    """

    folder: Path
    pipeline: DiffusionPipeline
    report: SizeReport

    @property
    def label(self) -> str:
        """The origin of the weights and their bits a weight: "trained, 2.03 bits"."""
        return f"{origin(self.folder)}, {self.report.average_bits.layers:.2f} bits ({self.folder.name})"


def fetch(source: str | os.PathLike[str]) -> Path:
    """Return the folder of a pipeline or model, downloaded where `source` is a Hub id.

    Raises:
        OSError: there is neither.
    """
    return Path(source) if Path(source).is_dir() else Path(snapshot_download(os.fspath(source)))


def denoiser_folder(folder: Path) -> Path:
    """Return the folder of the UNet or transformer in a pipeline's; `folder` itself where it holds a model.

    Raises:
        ValueError: a pipeline without UNet or transformer.
    """
    if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        return folder
    check_pipeline(str(folder))
    return next(folder / name for name in DENOISERS if (folder / name).is_dir())


def refuse_quantized(folder: Path) -> None:
    """Refuse a quantized pipeline in the place of the full-precision one.

    Raises:
        ValueError: it is quantized.
    """
    config = read_json(denoiser_folder(folder) / "config.json", non_finite=True)
    if "quantization_config" in config:
        raise ValueError(f"{folder} is quantized already, and shown it would be as full precision. Name the original.")


def quantize(source: Path, folder: Path, target_bits: float) -> Path:
    """Save the pipeline in `source` quantized, in `folder`."""
    config = BitsFusionConfig(target_bits=target_bits)
    DiffusionPipeline.from_pretrained(source, quantization_config=config, dtype=torch.float16).save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> DiffusionPipeline:
    """Load a pipeline in fp16 on a GPU, where there is none in fp32 on the CPU; with `unet`, that model in it."""
    return load_pipeline(folder, dtype=default_dtype(default_device()), **options)


def load_quantized(folder: Path, full: Path) -> Quantized:
    """Load a quantized pipeline, or the pipeline in `full` with the quantized model in `folder`.

    Raises:
        ValueError: it is not quantized by this package.
    """
    place = denoiser_folder(folder)
    report = size_report(place)
    assert isinstance(report, SizeReport)
    pipeline = load(full, unet=folder) if place == folder else load(folder)
    return Quantized(folder, pipeline, report)
