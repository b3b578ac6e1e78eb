import random
import time

import numpy as np
import pytest
from PIL import Image

from examples.shapes.captions import heldout_prompts, sample_prompt
from examples.shapes.render import render, render_soft
from examples.shapes.scenes import CATEGORIES, SHAPES, ObjectSpec, PromptSpec, SceneObject, sample_scene, satisfies
from examples.shapes.scorer import UNKNOWN, detect, score


def _rendered(category, style, n):
    """Specifications, scenes and images, half of them held out."""
    rng = random.Random(3)
    specs = [sample_prompt(rng, category, held_out=index % 2 == 0).spec for index in range(n)]
    scenes = [sample_scene(rng, spec) for spec in specs]
    images = [render(scene) if style == "hard" else render_soft(scene, rng) for scene in scenes]
    return specs, scenes, images


@pytest.mark.parametrize("style", ["hard", "soft"])
@pytest.mark.parametrize("category", CATEGORIES)
def test_right_on_ground_truth_and_on_other_captions(category, style):
    specs, scenes, images = _rendered(category, style, 200)
    assert np.mean(score(images, specs)) >= 0.98
    detected = [detect(image) for image in images]
    false_yes = [
        satisfies(found, spec)
        for found, scene in zip(detected, scenes, strict=True)
        for spec in specs
        if not satisfies(scene, spec)
    ]
    assert np.mean(false_yes) <= 0.05


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [6, 7, 10, 11])
def test_finds_shape_place_and_size(shape, radius):
    (found,) = detect(render((SceneObject(shape, "purple", 30, 25, radius),)))
    assert (found.shape, found.color) == (shape, "purple")
    assert found.size == ("small" if radius < 8 else "large")
    assert abs(found.x - 30) <= 1
    assert abs(found.y - 25) <= 2


def test_noise_empty_and_merged_images_fit_no_prompt():
    spec = PromptSpec("single_object", (ObjectSpec("circle"),))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    empty = np.full((64, 64, 3), 224, np.uint8)
    assert score([noise, empty], [spec, spec]) == [False, False]
    merged = render((SceneObject("circle", "red", 26, 30, 7), SceneObject("circle", "red", 36, 33, 7)))
    assert [found.shape for found in detect(merged)] == [UNKNOWN]


def test_accepts_pil_images_and_refuses_unequal_lengths():
    spec = PromptSpec("single_object", (ObjectSpec("heart"),))
    image = Image.fromarray(render((SceneObject("heart", "red", 30, 30, 10),)))
    assert score([image], [spec]) == [True]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        score([image], [spec, spec])


def test_600_images_in_under_10_seconds():
    rng = random.Random(0)
    specs = [prompt.spec for prompt in heldout_prompts(600)]
    images = [render(sample_scene(rng, spec)) for spec in specs]
    started = time.perf_counter()
    assert all(score(images, specs))
    assert time.perf_counter() - started < 10
