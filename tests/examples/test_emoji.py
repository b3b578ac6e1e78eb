"""The emoji data set: what is held out, the score against a plain statement of it, and its training, end to end."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from examples.emoji import pretrain
from examples.emoji.data import build, load
from examples.emoji.prompts import ranks, score, score_top5, write_prompts


def test_every_word_of_a_held_out_name_is_seen_in_training():
    _, emojis = load()
    seen = {word for emoji in emojis if not emoji.heldout for word in emoji.name.split()}
    heldout = [emoji.name for emoji in emojis if emoji.heldout]
    assert len(heldout) == 41
    assert all(set(name.split()) <= seen for name in heldout)


def test_training_sees_no_held_out_picture():
    images, emojis = load()
    shown, names = pretrain.training_set()
    assert {emoji.name for emoji in emojis if emoji.heldout}.isdisjoint(names)
    assert len(names) == len(shown) == 541
    for emoji, image in zip(emojis, images, strict=True):
        assert emoji.heldout or (shown[names.index(emoji.name)] == image).all()


def test_ranks_count_the_nearer_emoji():
    images, emojis = load()
    rng = np.random.default_rng(0)
    drawn = np.clip(images[:6].astype(int) + rng.normal(0, 90, images[:6].shape), 0, 255).astype(np.uint8)
    drawn[3:] = np.stack([images[300], images[20], 255 - images[5]])
    expected = []
    for wanted, image in enumerate(drawn):
        differences = [np.mean((image / 255.0 - other / 255.0) ** 2) for other in images]
        expected.append(sum(d < differences[wanted] for d in differences))
    found = ranks(list(drawn), [emoji.name for emoji in emojis[:6]])
    assert found.tolist() == expected
    assert max(expected) > 4
    specs = [{"name": emoji.name} for emoji in emojis[:6]]
    assert score(list(drawn), specs) == [rank == 0 for rank in expected]
    assert score_top5([Image.fromarray(image) for image in drawn], specs) == [rank < 5 for rank in expected]


def test_every_emoji_is_its_own_nearest():
    images, emojis = load()
    assert (ranks(images, [emoji.name for emoji in emojis]) == 0).all()


def test_an_unknown_name_is_refused():
    with pytest.raises(KeyError, match="no such emoji"):
        ranks([np.zeros((64, 64, 3), np.uint8)], ["no such emoji"])


def test_an_archive_without_the_list_is_refused(tmp_path):
    archive = tmp_path / "other.tgz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(Path(__file__), "package/readme")
    with pytest.raises(KeyError, match=r"package/emoji\.json"):
        build(archive, tmp_path)


def test_prompts_name_each_emoji_once_with_held_out_ones_apart(tmp_path):
    write_prompts(tmp_path / "prompts.tsv")
    header, *lines = (tmp_path / "prompts.tsv").read_text(encoding="utf-8").splitlines()
    assert header.split("\t") == ["Prompt", "Category", "Spec"]
    rows = [line.split("\t") for line in lines]
    _, emojis = load()
    assert [(prompt, category.startswith("new "), json.loads(spec)) for prompt, category, spec in rows] == [
        (emoji.name, emoji.heldout, {"name": emoji.name}) for emoji in emojis
    ]


def test_a_few_steps_of_each_stage_end_in_a_pipeline_that_draws(tmp_path, monkeypatch):
    images, names = pretrain.training_set()
    monkeypatch.setattr(pretrain, "training_set", lambda: (images[:8], names[:8]))
    pretrain.main(
        ["--work-dir", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--steps", "2", "--batch-size", "2"]
    )
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    image = pipe("green heart", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()
    assert (tmp_path / "out" / "clip" / "model.safetensors").is_file()
