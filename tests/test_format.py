"""docs/FORMAT.md is complete: the reader on the page, which knows nothing of this package, reads a saved model."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny import tiny_unet

from diffusers_bitsfusion import BitsFusionConfig, quantize_model

PAGE = Path(__file__).parent.parent / "docs" / "FORMAT.md"


def reader_source() -> str:
    return re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]


def read_layers(folder):
    scope: dict = {}
    exec(reader_source(), scope)
    return dict(scope["read_layers"](folder))


def test_reader_is_short_and_uses_only_public_libraries():
    source = reader_source()
    assert len(source.strip().splitlines()) <= 40
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    assert imported == {"json", "pathlib", "numpy", "zstandard", "safetensors"}


@pytest.mark.parametrize("compression", ["zstd", None])
@pytest.mark.parametrize("shards", [None, "100KB"])
def test_reader_gets_the_weights_that_dequantize_gives(tmp_path, compression, shards):
    recipe = {name: 1 + i % 8 for i, name in enumerate(_ordinary_layers())}
    unet = quantize_model(tiny_unet(), BitsFusionConfig(recipe=recipe, compression=compression), progress=False)
    unet.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards is not None)
    weights = read_layers(tmp_path)
    plain = unet.dequantize()
    assert set(recipe) <= set(weights)
    for name, weight in weights.items():
        expected = plain.get_submodule(name).weight.detach().to(torch.float32).numpy()
        assert np.array_equal(weight, expected), name


def test_reader_gets_the_time_embedding(tmp_path):
    unet = quantize_model(tiny_unet(), BitsFusionConfig(recipe=2, time_embedding="table"), progress=False)
    unet.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    scope: dict = {}
    exec(reader_source(), scope)
    names = ("time_proj.embedding_codes", "time_proj.embedding_scale")
    table = scope["read_table"](*(tensors[name] for name in names), 1000)
    plain = tiny_unet()
    with torch.no_grad():
        expected = plain.time_embedding(plain.time_proj(torch.arange(-1, 1001))).numpy()
    assert np.linalg.norm(table - expected) < 0.005 * np.linalg.norm(expected)


def _ordinary_layers() -> list[str]:
    special = ("conv_in", "conv_out", "time_emb")
    return [
        name
        for name, module in tiny_unet().named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and not any(part in name for part in special)
    ]
