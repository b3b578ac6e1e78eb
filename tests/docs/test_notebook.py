"""The notebook runs from its first cell to its last, in fewer steps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from code_blocks import REPOSITORY

pytestmark = pytest.mark.usefixtures("one_thread")

NOTEBOOK = json.loads((REPOSITORY / "docs/notebooks/shapes.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    source = "\n".join(CELLS)
    for costly, cheap in {
        "INFERENCE_STEPS = 40, 16, 20": "INFERENCE_STEPS = 2, 2, 2",
        "num_inference_steps=5": "num_inference_steps=1",
        '"shapes-2bit"': repr(str(tmp_path / "shapes-2bit")),
    }.items():
        assert costly in source
        source = source.replace(costly, cheap)
    namespace: dict[str, Any] = {}
    exec(compile(source, "docs/notebooks/shapes.ipynb", "exec"), namespace)
    saved, reloaded = (namespace[name].unet for name in ("student", "again"))
    sample, states = torch.randn(1, 4, 16, 16), torch.randn(1, 77, saved.config.cross_attention_dim)
    with torch.no_grad():
        assert torch.equal(saved(sample, 501, states).sample, reloaded(sample, 501, states).sample)


def test_the_notebook_is_committed_without_outputs():
    outputs = [cell["outputs"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert outputs == [[]] * len(CELLS)
