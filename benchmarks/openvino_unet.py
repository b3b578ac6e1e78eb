"""A UNet of diffusers as an OpenVINO model: written, quantized to int8 by NNCF, and called like the original.

pip install openvino nncf        in the peers' environment
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

FILE = "openvino_model.xml"
WEIGHTS = "openvino_model.bin"

# Random calls that NNCF sees when it chooses the scales of activations.
_CALIBRATION_CALLS = 4

_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class Positional(nn.Module):
    """The UNet with tensors alone for arguments and output, which tracing needs."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def random_call(config: Any, size: int) -> dict[str, Tensor]:
    """Return random arguments of `Positional`, batch 2."""
    return {
        "sample": torch.randn(2, config["in_channels"], size, size),
        "timestep": torch.tensor(501),
        "encoder_hidden_states": torch.randn(2, 77, config["cross_attention_dim"]),
    }


@torch.no_grad()
def write(source: Path, out: Path, int8: bool = False) -> None:
    """Convert the UNet at `source` to `out`, weights in fp16, or quantized to int8 with smooth quantization."""
    import openvino
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(source, dtype=torch.float32).eval()
    size = unet.config.sample_size
    model = openvino.convert_model(Positional(unet), example_input=random_call(unet.config, size))
    if int8:
        import nncf

        calls = [random_call(unet.config, size) for _ in range(_CALIBRATION_CALLS)]
        inputs = nncf.Dataset(calls, lambda call: {name: x.numpy() for name, x in call.items()})
        model = nncf.quantize(model, inputs, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calls))
    openvino.save_model(model, out / FILE, compress_to_fp16=True)
    unet.save_config(out)  # last: a folder with a config is complete


class OpenVINOUNet(nn.Module):
    """A written model, compiled for each shape that it is called with, on the threads that torch computes with.

    Args:
        path: folder that `write` made.
        dtype: that OpenVINO is hinted to compute in.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            **{"addition_embed_type": None, **json.loads((path / "config.json").read_text())}
        )
        self.path, self.dtype, self.device = path, dtype, torch.device("cpu")
        self.resident_bytes = (path / WEIGHTS).stat().st_size  # at least: what it makes of them is not told
        self._compiled: dict[torch.Size, Any] = {}

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        arrays = {name: x.float().numpy() if x.is_floating_point() else x.numpy() for name, x in inputs.items()}
        if sample.shape not in self._compiled:
            self._compiled[sample.shape] = self._compile(arrays)
        return torch.from_numpy(self._compiled[sample.shape](arrays)[0])

    def _compile(self, arrays: dict[str, Any]) -> Any:
        import openvino

        core = openvino.Core()
        model = core.read_model(self.path / FILE)
        model.reshape({name: list(x.shape) for name, x in arrays.items()})
        hints = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[self.dtype],
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            "PERFORMANCE_HINT": "LATENCY",
        }
        return core.compile_model(model, "CPU", hints)
