"""Data and arguments of short runs of the training script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from train_runs import write_images


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Arrays of seven pictures, and a file of prompts."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder)
    (folder / "prompts.txt").write_text("a b\nc\nd e\n")
    return folder


@pytest.fixture
def command(source_folder, tmp_path) -> Callable[..., list[str]]:
    """Arguments of a short run on the tiny pipeline, with others added; a quiet one makes no estimate first."""

    def make(*arguments, output="out", steps=2, batch=2, quiet=True):
        common = {
            "pretrained_model_name_or_path": source_folder,
            "output_dir": tmp_path / output,
            "target_bits": 2.6,
            "max_train_steps": steps,
            "train_batch_size": batch,
            "learning_rate": 1e-3,
        }
        loudness = ["--quiet"] * quiet
        named = (str(part) for key, value in common.items() for part in (f"--{key}", value))
        return [*named, *loudness, *map(str, arguments)]

    return make
