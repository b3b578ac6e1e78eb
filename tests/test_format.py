"""docs/FORMAT.md is complete: the reader on the page, which knows nothing of this package, reads a saved model."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from helpers import smooth_unet
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
    assert len(source.strip().splitlines()) <= 55
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    assert imported == {"json", "pathlib", "numpy", "zstandard", "safetensors"}


@pytest.mark.parametrize(
    ("compression", "shards", "scale_dtype"),
    [("zstd", None, "float32"), ("zstd", "100KB", "bfloat16"), (None, None, "bfloat16"), (None, "100KB", "float32")],
)
def test_reader_gets_the_weights_that_dequantize_gives(tmp_path, compression, shards, scale_dtype):
    recipe = {name: 1 + i % 8 for i, name in enumerate(_ordinary_layers())}
    config = BitsFusionConfig(recipe=recipe, compression=compression, scale_dtype=scale_dtype)
    unet = quantize_model(tiny_unet(), config, progress=False)
    unet.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards is not None)
    weights = read_layers(tmp_path)
    plain = unet.dequantize()
    assert set(recipe) <= set(weights)
    for name, weight in weights.items():
        expected = plain.get_submodule(name).weight.detach().to(torch.float32).numpy()
        assert np.array_equal(weight, expected), name


def test_reader_gets_the_time_embedding(tmp_path):
    tensors, scope = _saved_with_a_table(tiny_unet(), tmp_path)
    names = ("time_proj.embedding_codes", "time_proj.embedding_scale")
    table = scope["read_table"](*(tensors[name] for name in names), 1000)
    expected, _ = _time_embedding_and_features(tiny_unet())
    assert np.linalg.norm(table - expected) < 0.005 * np.linalg.norm(expected)


def test_reader_gets_a_table_of_low_rank(tmp_path):
    tensors, scope = _saved_with_a_table(smooth_unet(), tmp_path)
    time = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["time_embedding"]
    sizes = [size for _, size in time["features"]] + [time["embedding_width"]]
    table = scope["read_low_rank"](tensors, sizes, time["rank"])
    embedding, features = _time_embedding_and_features(smooth_unet())
    expected = np.concatenate([features, embedding], axis=1)
    assert np.linalg.norm(table - expected) < 0.006 * np.linalg.norm(expected)
    found = UNet2DConditionModel.from_pretrained(tmp_path).time_proj.table.dense().numpy()
    np.testing.assert_allclose(found, table, rtol=1e-4, atol=1e-4 * np.abs(table).max())


def _saved_with_a_table(unet: UNet2DConditionModel, folder: Path) -> tuple[dict, dict]:
    """Return the tensors of a saved UNet, and what the reader defines."""
    quantize_model(unet, BitsFusionConfig(recipe=2, time_embedding="table"), progress=False).save_pretrained(folder)
    scope: dict = {}
    exec(reader_source(), scope)
    return load_file(folder / "diffusion_pytorch_model.safetensors"), scope


def _time_embedding_and_features(plain: UNet2DConditionModel) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        embedding = plain.time_embedding(plain.time_proj(torch.arange(-1, 1001)))
        blocks = [module for module in plain.modules() if isinstance(module, ResnetBlock2D)]
        features = torch.cat([block.time_emb_proj(F.silu(embedding)) for block in blocks], dim=1)
    return embedding.numpy(), features.numpy()


def _ordinary_layers() -> list[str]:
    special = ("conv_in", "conv_out", "time_emb")
    return [
        name
        for name, module in tiny_unet().named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and not any(part in name for part in special)
    ]
