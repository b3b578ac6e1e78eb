"""A packed pipeline as OpenVINO models, in the folder that optimum-intel's pipelines load."""

from __future__ import annotations

import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from ..integrations.folder_commit import replacing
from ..nn.traceable import make_traceable
from ..utils.installation import install_command
from .low_bit import use_low_bits

# Name of a model in its folder, as optimum-intel looks for it.
FILE = "openvino_model.xml"

# Exported parts by the component's name; a pipeline of other parts would lack some of them.
_EXPORTED: dict[str, type[nn.Module]] = {
    "text_encoder": CLIPTextModel,
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
}


class _Traced(nn.Module, ABC):
    """A model with tensors alone for arguments and output, as tracing needs, and the names that optimum-intel uses."""

    model: Any
    outputs: tuple[str, ...]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def example(self) -> dict[str, Tensor]:
        """Return arguments of `forward`."""


class _TextEncoder(_Traced):
    outputs = ("last_hidden_state", "pooler_output")

    def example(self) -> dict[str, Tensor]:
        return {"input_ids": torch.ones(2, self.model.config.max_position_embeddings, dtype=torch.int64)}

    def forward(self, input_ids: Tensor) -> Any:
        return self.model(input_ids, return_dict=False)[:2]


class _UNet(_Traced):
    outputs = ("out_sample",)

    def example(self) -> dict[str, Tensor]:
        config = self.model.config
        return {
            "sample": torch.zeros(2, config.in_channels, config.sample_size, config.sample_size),
            "timestep": torch.tensor(1.0),  # It is floating, since the timesteps of some schedulers are.
            "encoder_hidden_states": torch.zeros(2, 77, config.cross_attention_dim),
        }

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _VAEEncoder(_Traced):
    outputs = ("latent_parameters",)

    def example(self) -> dict[str, Tensor]:
        config = self.model.config
        return {"sample": torch.zeros(1, config.in_channels, config.sample_size, config.sample_size)}

    def forward(self, sample: Tensor) -> Any:
        return self.model.encode(sample, return_dict=False)[0].parameters


class _VAEDecoder(_Traced):
    outputs = ("sample",)

    def example(self) -> dict[str, Tensor]:
        config = self.model.config
        size = config.sample_size // 2 ** (len(config.block_out_channels) - 1)
        return {"latent_sample": torch.zeros(1, config.latent_channels, size, size)}

    def forward(self, latent_sample: Tensor) -> Any:
        return self.model.decode(latent_sample, return_dict=False)[0]


@torch.no_grad()
def export_openvino(pipeline: DiffusionPipeline, directory: str | os.PathLike[str]) -> None:
    """Write a pipeline as OpenVINO models, which `optimum.intel.OVStableDiffusionPipeline.from_pretrained` loads.

    Packed layers are constants of two bits (three levels), four (five and nine levels) or eight, with a scale in fp16
    for each output channel; all else is in fp16.

    Args:
        pipeline: a Stable Diffusion pipeline in fp32 on a CPU, with any number of packed models. Its models are taken
            apart: use them no further.
        directory: folder to write.

    Raises:
        ImportError: openvino is not installed.
        ValueError: the pipeline has other parts than Stable Diffusion's; nothing is written then.
        OSError: the folder cannot be written.
    """
    try:
        import openvino
    except ImportError as error:
        raise ImportError(f"Exporting needs openvino: {install_command('openvino')}.") from error
    _check(pipeline)
    with replacing(Path(directory)) as files:
        for name, module in pipeline.components.items():
            if name in _EXPORTED:
                _export(openvino, name, module.eval(), files)
            elif module is not None and hasattr(module, "save_pretrained"):
                module.save_pretrained(files / name)
        pipeline.save_config(files)


def _check(pipeline: DiffusionPipeline) -> None:
    for name, kind in _EXPORTED.items():
        found = getattr(pipeline, name, None)
        if not isinstance(found, kind):
            raise ValueError(
                f"Only Stable Diffusion 1 and 2 can be exported: {name} of {type(pipeline).__name__} is "
                f"{type(found).__name__}, not {kind.__name__}."
            )
    unet = pipeline.unet.config
    if unet.addition_embed_type is not None or unet.time_cond_proj_dim is not None:
        raise ValueError("Only a UNet of a sample, a timestep and a prompt can be exported; this one takes more.")
    for name in _EXPORTED:
        model = getattr(pipeline, name)
        if model.dtype != torch.float32 or model.device.type != "cpu":
            raise ValueError(
                f"{name} is in {model.dtype} on {model.device}: load the pipeline with dtype=torch.float32, on a CPU."
            )


def _export(openvino: Any, name: str, module: Any, files: Path) -> None:
    bits = make_traceable(module)
    for folder, traced in _parts(name, module):
        with warnings.catch_warnings():  # torch warns of checks of shapes, which hold for every call.
            warnings.simplefilter("ignore")
            converted = openvino.convert_model(traced, example_input=traced.example())
        for output, output_name in zip(converted.outputs, traced.outputs, strict=True):
            output.tensor.set_names({output_name})
        use_low_bits(converted, bits, prefix="self.model.")
        openvino.save_model(converted, files / folder / FILE, compress_to_fp16=True)
        config = json.loads(module.config.to_json_string() if name == "text_encoder" else module.to_json_string())
        config.pop("quantization_config", None)  # The exported model is no packed file.
        (files / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _parts(name: str, module: nn.Module) -> Iterator[tuple[str, _Traced]]:
    """Folders of a component, with what is traced for each."""
    if name == "vae":
        yield "vae_encoder", _VAEEncoder(module)
        yield "vae_decoder", _VAEDecoder(module)
    else:
        yield name, _TextEncoder(module) if name == "text_encoder" else _UNet(module)
