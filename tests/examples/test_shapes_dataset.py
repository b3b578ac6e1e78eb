import random

import numpy as np
import pytest

from examples.shapes.captions import TEMPLATES, heldout_prompts, sample_foil, sample_paraphrase, sample_prompt
from examples.shapes.dataset import FREE, build_dataset, load_dataset
from examples.shapes.render import render
from examples.shapes.scenes import (
    CATEGORIES,
    COUNTS,
    HELD_OUT_COLORS,
    HELD_OUT_PAIRS,
    IMAGE_SIZE,
    ObjectSpec,
    PromptSpec,
    SceneObject,
    nearest_color,
    sample_free_scene,
    sample_scene,
    sample_spec,
    satisfies,
)


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("held_out", [False, True])
def test_a_scene_satisfies_its_prompt_and_stays_in_the_image(category, held_out):
    rng = random.Random(0)
    for _ in range(200):
        spec = sample_spec(rng, category, held_out)
        scene = sample_scene(rng, spec)
        assert satisfies(scene, spec)
        for item in scene:
            assert item.radius <= min(item.x, item.y)
            assert max(item.x, item.y) + item.radius <= IMAGE_SIZE - 1


def test_each_of_two_related_objects_lies_in_its_own_half():
    rng = random.Random(0)
    middle = IMAGE_SIZE / 2
    for _ in range(200):
        spec = sample_spec(rng, "position")
        first, second = sample_scene(rng, spec)
        if spec.relation in ("right of", "below"):
            first, second = second, first
        axis = "x" if spec.relation in ("left of", "right of") else "y"
        assert getattr(first, axis) < middle < getattr(second, axis)


@pytest.mark.parametrize("count", COUNTS)
def test_counted_objects_lie_as_on_a_die(count):
    """Up to a quarter turn, in the cells of a grid of three by three that a die's face has eyes in."""
    eyes = {2: "a i", 3: "a e i", 4: "a c g i", 5: "a c e g i", 6: "a c d f g i"}[count].split()
    turned = {"a": "c", "c": "i", "i": "g", "g": "a", "d": "b", "f": "h", "e": "e"}
    allowed = {frozenset(eyes), frozenset(turned[eye] for eye in eyes)}
    rng, found = random.Random(0), set()
    for _ in range(100):
        scene = sample_scene(rng, PromptSpec("counting", (ObjectSpec("circle"),) * count))
        cells = frozenset(
            "abcdefghi"[round((item.y - 32) / 19 + 1) * 3 + round((item.x - 32) / 19 + 1)] for item in scene
        )
        assert cells in allowed
        found.add(cells)
    assert found == allowed


def test_training_never_shows_what_is_held_out():
    rng = random.Random(0)
    for index in range(6000):
        prompt = sample_prompt(rng, CATEGORIES[index % 6])
        scene = sample_scene(rng, prompt.spec)
        assert not any((item.color, item.shape) in HELD_OUT_COLORS for item in scene)
        assert frozenset(item.shape for item in scene) not in HELD_OUT_PAIRS


def test_free_scenes_hold_out_the_same():
    rng = random.Random(0)
    shades = set()
    for _ in range(2000):
        scene = sample_free_scene(rng)
        shapes = {item.shape for item in scene}
        assert not any(pair <= shapes for pair in HELD_OUT_PAIRS)
        assert not any((nearest_color(item.rgb), item.shape) in HELD_OUT_COLORS for item in scene)
        shades |= {item.rgb for item in scene}
    assert len(shades) > 2000
    image = render(scene)
    assert {item.rgb for item in scene} <= {tuple(map(int, pixel)) for pixel in image.reshape(-1, 3)}


def test_heldout_prompts_are_distinct_balanced_reproducible_and_unseen():
    prompts = heldout_prompts(720)
    captions = {prompt.caption for prompt in prompts}
    assert prompts == heldout_prompts(720)
    assert prompts[:600] == heldout_prompts(600)
    assert len(captions) == 720
    assert all(sum(p.spec.category == category for p in prompts) == 120 for category in CATEGORIES)
    rng = random.Random(0)
    assert captions.isdisjoint(sample_prompt(rng, CATEGORIES[index % 6]).caption for index in range(20000))


def test_every_category_has_five_wordings():
    assert set(TEMPLATES) == set(CATEGORIES)
    assert all(len(set(templates)) >= 5 for templates in TEMPLATES.values())


@pytest.mark.parametrize("category", CATEGORIES)
def test_scenes_satisfy_paraphrases_and_contradict_foils(category):
    rng = random.Random(0)
    for _ in range(300):
        prompt = sample_prompt(rng, category)
        scene = sample_scene(rng, prompt.spec)
        assert satisfies(scene, sample_paraphrase(rng, prompt).spec)
        assert not satisfies(scene, sample_foil(rng, prompt).spec)


def test_satisfies_wants_the_exact_objects():
    circle, square = SceneObject("circle", "red", 20, 20, 7), SceneObject("square", "blue", 44, 22, 11)
    asks = PromptSpec("two_object", (ObjectSpec("square"), ObjectSpec("circle", size="small")))
    assert satisfies((circle, square), asks)
    assert not satisfies((circle,), asks)
    assert not satisfies((circle, square, circle), asks)
    swapped = PromptSpec("color_attr", (ObjectSpec("circle", "blue"), ObjectSpec("square", "red")))
    assert not satisfies((circle, square), swapped)
    for relation, expected in {"left of": True, "right of": False, "above": False, "below": False}.items():
        placed = PromptSpec("position", (ObjectSpec("circle"), ObjectSpec("square")), relation)
        assert satisfies((square, circle), placed) == expected


def test_unknown_category():
    with pytest.raises(ValueError, match="unknown category 'texture'"):
        sample_spec(random.Random(0), "texture")


def test_dataset_on_disk(tmp_path):
    build_dataset(tmp_path, 20)
    images, captions, foils = load_dataset(tmp_path)
    assert images.shape == (20, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert images.dtype == np.uint8
    assert len(captions) == len(foils) == 20
    free = round(20 * FREE)
    assert all(captions[:-free]) and all(foils[:-free]) and not any(captions[-free:] + foils[-free:])
    assert all(image.std() > 0 for image in images)
