"""The example's prompts and scorer through the interface of the evaluation."""

from __future__ import annotations

import random

from diffusers_bitsfusion.evaluation import load_scorer, read_prompts
from examples.shapes import prompts as shapes
from examples.shapes.captions import heldout_prompts
from examples.shapes.render import render
from examples.shapes.scenes import sample_scene


def test_prompts_survive_the_file_and_the_scorer_reads_them(tmp_path):
    path = tmp_path / "prompts.tsv"
    shapes.write_prompts(path, 24)
    written, expected = read_prompts(path), heldout_prompts(24)
    assert [(p.caption, p.category) for p in written] == [(p.caption, p.spec.category) for p in expected]
    rng = random.Random(0)
    images = [render(sample_scene(rng, prompt.spec)) for prompt in expected]
    score = load_scorer("examples.shapes.prompts:score")
    specs = [prompt.spec for prompt in written]
    assert sum(score(images, specs)) >= 23
    assert sum(score(images, specs[1:] + specs[:1])) <= 1
