"""Data and arguments of short runs of the training script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from train_runs import CAPTIONS


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Arrays of seven pictures, and a file of prompts."""
    folder = tmp_path_factory.mktemp("data")
    images = np.random.default_rng(0).integers(0, 255, (len(CAPTIONS), 16, 16, 3), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    (folder / "captions.json").write_text(json.dumps({"captions": CAPTIONS}))
    (folder / "prompts.txt").write_text("a b\nc\nd e\n")
    return folder


@pytest.fixture
def command(source_folder, tmp_path) -> Callable[..., list[str]]:
    """Arguments of a short run on the tiny pipeline, with others added."""

    def make(*arguments, output="out", steps=2, batch=2):
        common = {
            "pretrained_model_name_or_path": source_folder,
            "output_dir": tmp_path / output,
            "target_bits": 2.6,
            "max_train_steps": steps,
            "train_batch_size": batch,
            "learning_rate": 1e-3,
        }
        return [*(str(part) for key, value in common.items() for part in (f"--{key}", value)), *map(str, arguments)]

    return make
