"""Captions for prompt specifications, in several wordings a category, and the held-out prompts."""

import random
from dataclasses import dataclass, replace

from .scenes import CATEGORIES, COLORS, COUNTS, RADII, RELATIONS, SHAPES, ObjectSpec, PromptSpec, sample_spec

TEMPLATES = {
    "single_object": (
        "{a}",
        "a photo of {a}",
        "a picture of {a}",
        "an image of {a}",
        "a drawing of {a}",
        "there is {a}",
        "here is {a}",
        "just {a}",
        "nothing but {a}",
        "a picture showing {a}",
    ),
    "two_object": (
        "{a} and {b}",
        "a photo of {a} and {b}",
        "a picture of {a} and {b}",
        "there is {a} and {b}",
        "{a} together with {b}",
        "an image showing {a} and {b}",
    ),
    "counting": (
        "{n} {things}",
        "a photo of {n} {things}",
        "there are {n} {things}",
        "exactly {n} {things}",
        "a picture of {n} {things}",
        "an image showing {n} {things}",
    ),
    "colors": (
        "{a}",
        "a photo of {a}",
        "a picture of {a}",
        "there is {a}",
        "just {a}",
        "an image showing {a}",
    ),
    "position": (
        "{a} {relation} {b}",
        "a photo of {a} {relation} {b}",
        "{a} is {relation} {b}",
        "there is {a} {relation} {b}",
        "a picture of {a} {relation} {b}",
        "an image showing {a} {relation} {b}",
    ),
    "color_attr": (
        "{a} and {b}",
        "a photo of {a} and {b}",
        "a picture of {a} and {b}",
        "there is {a} and {b}",
        "{a} together with {b}",
        "an image showing {a} and {b}",
    ),
}
_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
_RELATIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_SIZES = (None, "small", "large")


@dataclass(frozen=True)
class Prompt:
    """A caption and what it asks for."""

    caption: str
    spec: PromptSpec


def sample_prompt(rng: random.Random, category: str, held_out: bool = False) -> Prompt:
    """Draw a prompt of `category`; with `held_out`, only one that asks for what training never shows."""
    while True:
        spec = sample_spec(rng, category, held_out)
        template = rng.randrange(len(TEMPLATES[category]))
        if category != "single_object" or _held_out_wording(spec.objects[0], template) == held_out:
            return Prompt(_caption(rng, spec, TEMPLATES[category][template]), spec)


def sample_paraphrase(rng: random.Random, prompt: Prompt) -> Prompt:
    """The same request in other words; two objects change places half of the time, their relation with them."""
    spec = prompt.spec
    if len(set(spec.objects)) == 2 and rng.random() < 0.5:
        relation = _INVERSE[spec.relation] if spec.relation else None
        spec = PromptSpec(spec.category, spec.objects[::-1], relation)
    return Prompt(_caption(rng, spec, rng.choice(TEMPLATES[spec.category])), spec)


def sample_foil(rng: random.Random, prompt: Prompt) -> Prompt:
    """A prompt like `prompt` with one thing wrong: the count, the relation, the binding, a size, a colour, a shape.

    Foils are never drawn; they are hard negatives for the contrastive training of the text tower.
    """
    spec = prompt.spec
    objects = list(spec.objects)
    relation = spec.relation
    if spec.category == "counting" and rng.random() < 0.75:
        count = rng.choice([n for n in COUNTS if n != len(objects) and abs(n - len(objects)) <= 2])
        objects = objects[:1] * count
    elif relation is not None and rng.random() < 0.75:
        relation = rng.choice([other for other in RELATIONS if other != relation])
    elif spec.category == "color_attr" and rng.random() < 0.75:
        first, second = objects
        objects = [replace(first, color=second.color), replace(second, color=first.color)]
    else:
        objects = _one_attribute_changed(rng, objects)
    foil = PromptSpec(spec.category, tuple(objects), relation)
    return Prompt(_caption(rng, foil, rng.choice(TEMPLATES[spec.category])), foil)


def heldout_prompts(n: int = 600, seed: int = 1024) -> list[Prompt]:
    """The first `n` held-out prompts, the categories in turn: the same list for the same arguments.

    Prompts are distinct within a category until its wordings are used up.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    prompts = []
    for index in range(n):
        category = CATEGORIES[index % len(CATEGORIES)]
        for _ in range(1000):
            prompt = sample_prompt(rng, category, held_out=True)
            if prompt.caption not in seen:
                break
        seen.add(prompt.caption)
        prompts.append(prompt)
    return prompts


def _one_attribute_changed(rng, objects):
    """Change one attribute of the first object, and of those that are the same object again."""
    old = objects[0]
    choices = [("shape", shape) for shape in SHAPES if shape not in {item.shape for item in objects}]
    if old.color:
        choices += [("color", color) for color in COLORS if color != old.color]
    if old.size:
        choices += [("size", size) for size in RADII if size != old.size] * 4
    name, value = rng.choice(choices)
    return [replace(item, **{name: value}) if item == old else item for item in objects]


def _held_out_wording(wanted: ObjectSpec, template: int) -> bool:
    """Every shape and every size is shown alone in training, so here half of the wordings are held out."""
    return (SHAPES.index(wanted.shape) + _SIZES.index(wanted.size) + template) % 2 == 0


def _caption(rng, spec, template):
    first, last = spec.objects[0], spec.objects[-1]
    return template.format(
        a=_with_article(first),
        b=_with_article(last),
        n=_NUMBERS.get(len(spec.objects)),
        things=_plural(first),
        relation=rng.choice(_RELATIONS[spec.relation]) if spec.relation else None,
    )


def _words(wanted):
    return " ".join(word for word in (wanted.size, wanted.color, wanted.shape) if word)


def _with_article(wanted):
    words = _words(wanted)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(wanted):
    words = _words(wanted)
    return words + ("es" if words.endswith("s") else "s")
