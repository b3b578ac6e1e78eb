"""A UNet as a GGUF file, as diffusers reads it: Linear weights quantized, all else in fp16.

Written by the package `gguf`, which quantizes to 4 bits (Q4_0) but not to 2 (Q2_K): such blocks are random,
so that the file shows size and speed alone, as random weights do. Q2_K takes 256 inputs at a time; layers of other
widths fall back to four bits, as in llama.cpp.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

FILE = "model.gguf"
_SUPER_BLOCK, _SUPER_BLOCK_BYTES = 256, 84  # of Q2_K: 16 bytes of scales, 64 of codes, two fp16 factors


def write(source: Path, out: Path, kind: str) -> None:
    """Write the fp16 UNet at `source` to the folder `out`; `kind` is "Q4_0" or "Q2_K"."""
    import gguf
    import torch
    from diffusers import UNet2DConditionModel
    from gguf.quants import quantize

    types = gguf.GGMLQuantizationType
    unet = UNet2DConditionModel.from_pretrained(source, dtype=torch.float16)
    linear = {f"{name}.weight" for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear)}
    out.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out / FILE, arch="unet")
    for name, tensor in unet.state_dict().items():
        values = tensor.numpy()
        if name not in linear:
            writer.add_tensor(name, values)
        elif kind == "Q2_K" and values.shape[1] % _SUPER_BLOCK == 0:
            writer.add_tensor(name, _random_blocks(*values.shape), raw_dtype=types.Q2_K)
        else:
            writer.add_tensor(name, quantize(values.astype(np.float32), types.Q4_0), raw_dtype=types.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.copy(source / "config.json", out)


def _random_blocks(rows: int, columns: int) -> np.ndarray:
    """uint8 [rows, bytes of Q2_K]: scales and codes at random, both factors 1/1024."""
    blocks = np.random.default_rng(0).integers(
        0, 256, (rows, columns // _SUPER_BLOCK, _SUPER_BLOCK_BYTES), dtype=np.uint8
    )
    blocks[..., -4:] = np.full(2, 2.0**-10, np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def read(folder: Path, dtype: Any) -> Any:
    """The UNet that `write` left in `folder`, computing in `dtype`."""
    from diffusers import GGUFQuantizationConfig, UNet2DConditionModel

    config = GGUFQuantizationConfig(compute_dtype=dtype)
    return UNet2DConditionModel.from_single_file(
        str(folder / FILE), config=str(folder), quantization_config=config, dtype=dtype
    )
