"""Small files of every kind that this version writes, and what is read from them.

    python tests/kept_files.py tests/data/0.1
    python tests/kept_files.py tests/data/0.1-low-rank unet-low-rank   # of the kinds that are new
    python tests/kept_files.py tests/data/0.1-short-scales unet-short-scales

writes them, with hashes of what they hold, once for each version of a format; `test_kept_files.py` reads those of all
versions ever after.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    for part in ("examples", "."):
        sys.path.insert(0, str(Path(__file__).parents[1] / part))

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from tiny import tiny_unet
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_bitsfusion import BitsFusionConfig, prepare_qat, quantize_model
from diffusers_bitsfusion.calibration.calls import Call
from diffusers_bitsfusion.calibration.folder import CalibrationFolder, TuningFolder
from diffusers_bitsfusion.calibration.layers import quantize_layer
from diffusers_bitsfusion.calibration.moments import InputMoments
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.nn import PackedWeight
from diffusers_bitsfusion.training.checkpoints import load_checkpoint, load_weights, save_checkpoint

HASHES = "sha256.json"
SETTINGS = {"seed": 1, "model": "m"}
SMALLEST = {
    "block_out_channels": (4,), "norm_num_groups": 2, "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",), "mid_block_type": None, "cross_attention_dim": 4,
}  # fmt: skip
SMALL = SMALLEST | {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
# Names of tensors of 16 bits that a model keeps as bytes, see `codec.time_table.table_bytes`.
_IN_16_BITS = ("time_proj.values", "time_proj.basis", "time_proj.coefficients")
UNETS = {
    "unet-table": BitsFusionConfig(recipe=2),
    "unet-cache": BitsFusionConfig(
        recipe=3, compression=None, time_embedding={"type": "cache", "timesteps": [1.0, 500.0, 999.0]}
    ),
    "unet-keep": BitsFusionConfig(recipe=1, time_embedding="keep", balance=False),
    "unet-low-rank": BitsFusionConfig(recipe=1, time_embedding="table"),
    "unet-short-scales": BitsFusionConfig(recipe=1, time_embedding="keep", scale_dtype="bfloat16"),
}


def write(folder: Path, unets: Sequence[str] = ()) -> None:
    """Write files of every kind, and `HASHES`, the hashes of what `read` reads from them; only `unets` where given."""
    for name in unets or UNETS:
        unet = quantize_model(tiny_unet(**(SMALLEST if unets else SMALL)), UNETS[name], progress=False)
        unet.save_pretrained(folder / name, max_shard_size="4KB" if name == "unet-keep" else "10GB")
        for file in ("README.md", "bits_UNet2DConditionModel.png"):
            (folder / name / file).unlink()
    if not unets:
        _write_others(folder)
    (folder / HASHES).write_text(json.dumps(read(folder), indent=1) + "\n")


def _write_others(folder: Path) -> None:
    text = CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = quantize_model(CLIPTextModel(text).eval(), BitsFusionConfig(recipe=4), progress=False)
    encoder.save_pretrained(folder / "text-encoder")
    _write_calibration(folder / "calibration")
    accelerator, _ = _student()
    state = {"lr_scheduler": {"last_epoch": 1}, "ema": None}
    save_checkpoint(accelerator, folder / "training", 2, state, SETTINGS)


def read(folder: Path) -> dict[str, str]:
    """Read the files of `write`; return hashes of their values, by the kind of file."""
    unets = [name for name in UNETS if (folder / name).exists()]
    hashes = {name: _hash(_tensors(UNet2DConditionModel.from_pretrained(folder / name))) for name in unets}
    if not (folder / "training").exists():
        return hashes
    hashes["text-encoder"] = _hash(_tensors(CLIPTextModel.from_pretrained(folder / "text-encoder")))
    layer, moments, _ = _layer()
    calibration = CalibrationFolder(folder / "calibration", SETTINGS, 0)
    assert calibration.load_moments(0, {"a": moments}, 3) == 2
    kept = calibration.load_layer("a", layer, 2)
    assert kept is not None
    tuning = TuningFolder(folder / "calibration", 4, None)
    calls = [call.parts for call in tuning.load_calls(0) or []]
    hashes["calibration"] = _hash([moments.state_dict(), vars(kept), calls, tuning.load_state()])
    accelerator, student = _student()
    checkpoint = folder / "training" / "checkpoint-2"
    state = load_checkpoint(accelerator, checkpoint, SETTINGS)
    optimizer = accelerator._optimizers[0].state_dict()
    resumed = _hash([state, dict(student.state_dict()), optimizer["state"]])
    accelerator, student = _student(seed=1)
    load_weights(student, checkpoint, "m")
    return hashes | {"training": resumed, "training, weights": _hash(dict(student.state_dict()))}


def _write_calibration(folder: Path) -> None:
    _, moments, calibrated = _layer()
    written = CalibrationFolder(folder, SETTINGS, 0)
    written.save_moments(0, 2, {"a": moments})
    written.save_layer("a", calibrated)
    tuning = TuningFolder(folder, 4, None)
    tuning.save_calls(0, [Call((torch.randn(2, 4), 5), {"states": torch.randn(2, 3)}, torch.randn(2, 4))])
    parameter = nn.Parameter(torch.randn(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.randn(3)
    optimizer.step()
    values = [parameter.detach()]
    state = {"step": 2, "spreads": [0.5, None], "values": values, "optimizer": optimizer.state_dict()}
    tuning.save_state(state | {"surplus": 0.5})


def _layer() -> tuple[nn.Linear, InputMoments, Any]:
    torch.manual_seed(0)
    layer = nn.Linear(24, 8)
    moments = InputMoments(layer, 16)
    moments.add(torch.randn(50, 24))
    return layer, moments, quantize_layer(layer, moments, 2, rounding=Rounding())


def _student(seed: int = 0) -> tuple[Accelerator, UNet2DConditionModel]:
    """Return a model after a step of training, with the accelerator that has its optimizer."""
    accelerator = Accelerator(cpu=True)
    student = prepare_qat(tiny_unet(seed, **SMALLEST), BitsFusionConfig(recipe=2))
    _, optimizer = accelerator.prepare(student, torch.optim.Adam(student.parameters()))
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return accelerator, student


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of a model, packed weights dequantized to fp32 among them, and 16-bit codes as such."""
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedWeight)}
    assert packed
    tensors = dict(model.state_dict())
    in_16_bits = {name: tensors[name].view(torch.int16) for name in _IN_16_BITS if name in tensors}
    return tensors | in_16_bits | {f"{name}.weight": m.dense_weight(torch.float32) for name, m in packed.items()}


def _hash(value: Any) -> str:
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        data = value.detach().contiguous()
        digest.update(f"{data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for part in value:
            _update(digest, part)
    else:
        digest.update(repr(value).encode())


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    write(Path(sys.argv[1]), sys.argv[2:])
