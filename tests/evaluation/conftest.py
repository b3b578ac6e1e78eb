"""A tiny CLIP and prompts with specifications, for all tests of the evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from diffusers_bitsfusion.evaluation import Prompt


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIP of random weights on 16×16 images, as `save_pretrained` wrote it."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_tokenizer(folder)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": 0}
    text = tower | special | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = tower | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts() -> list[Prompt]:
    """Six prompts in two categories; the specification is what `bright` wants."""
    return [Prompt("a" * (1 + i), ("dark", "light")[i % 2], {"above": 100 + 20 * (i % 2)}) for i in range(6)]
