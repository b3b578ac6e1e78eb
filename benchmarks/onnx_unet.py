"""A UNet of diffusers as an ONNX model: written in fp32, and called like the original by ONNX Runtime.

pip install onnx onnxscript onnxruntime        in the peers' environment
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.openvino_unet import Positional, random_call

FILE = "model.onnx"
# ONNX keeps the weights of large models beside the graph; `peers.file_bytes` counts files of this suffix.
WEIGHTS = "model.bin"

# Version of the operators that a model is written with.
_OPSET = 20


@torch.no_grad()
def write(source: Path, out: Path) -> None:
    """Convert the UNet at `source` to `out`, for any batch, height and width."""
    import onnx
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(source, dtype=torch.float32).eval()
    call = random_call(unet.config, unet.config.sample_size)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as traced:  # The exporter writes a file for every weight.
        torch.onnx.export(
            Positional(unet),
            tuple(call.values()),
            Path(traced) / FILE,
            input_names=list(call),
            dynamic_axes={"sample": {0: "batch", 2: "height", 3: "width"}, "encoder_hidden_states": {0: "batch"}},
            opset_version=_OPSET,
            dynamo=False,
        )
        onnx.save_model(onnx.load(Path(traced) / FILE), out / FILE, save_as_external_data=True, location=WEIGHTS)
    unet.save_config(out)  # last: a folder with a config is complete


class ONNXUNet(nn.Module):
    """A written model in a session of ONNX Runtime, on the threads that torch computes with, in fp32.

    Args:
        path: folder that `write` made.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        super().__init__()
        self.config = SimpleNamespace(
            **{"addition_embed_type": None, **json.loads((path / "config.json").read_text())}
        )
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.resident_bytes = (path / WEIGHTS).stat().st_size  # at least: prepacked weights are not told
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session: Any = onnxruntime.InferenceSession(
            str(path / FILE), options, providers=["CPUExecutionProvider"]
        )

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        return torch.from_numpy(self._session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])
