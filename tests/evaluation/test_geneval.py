"""GenEval's judge against hand-made detections, and against the shapes scorer's own rule."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from PIL import Image

from diffusers_bitsfusion.evaluation.suites import geneval
from diffusers_bitsfusion.evaluation.suites.detection import crop
from examples.shapes import scorer as shapes_scorer
from examples.shapes.captions import heldout_prompts, sample_foil
from examples.shapes.geneval import detect, geneval_line, name_colors
from examples.shapes.render import render, render_soft
from examples.shapes.scenes import sample_scene


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


def line(tag, include, exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "a photo"}


def box_at(x, y, width=10, height=10):
    """A box by its centre."""
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def cat(score=0.95, box=(0, 0, 10, 10)):
    return ("cat", score, box, None)


def dog(score=0.95, box=(0, 0, 10, 10)):
    return ("dog", score, box, None)


SINGLE = line("single_object", [clause("cat")])
TWO = line("two_object", [clause("cat"), clause("dog")])
THREE = line("counting", [clause("cat", 3)], [clause("cat", 4)])
RED = line("colors", [clause("cat", color="red")])
TWO_RED = line("colors", [clause("cat", 2, color="red")])
COLORS_OF_TWO = line("color_attr", [clause("cat", color="red"), clause("dog", color="blue")])
JUST_ABOVE = np.nextafter(0.3, 1), np.nextafter(0.9, 1)


def placed(relation):
    return line("position", [clause("dog"), clause("cat", position=[relation, 0])])


CASES = {
    # Presence and the threshold of detections.
    "nothing found": (SINGLE, [], (), False),
    "found": (SINGLE, [cat()], (), True),
    "another class": (SINGLE, [dog()], (), False),
    "another class beside it does not matter": (SINGLE, [cat(), dog()], (), True),
    "several of it do not matter": (SINGLE, [cat(), cat(), cat()], (), True),
    "score at the threshold": (SINGLE, [cat(0.3)], (), False),
    "score just above the threshold": (SINGLE, [cat(JUST_ABOVE[0])], (), True),
    "score below the threshold": (SINGLE, [cat(0.29)], (), False),
    "both of two": (TWO, [dog(), cat()], (), True),
    "one of two": (TWO, [cat(), cat()], (), False),
    "one of two below the threshold": (TWO, [cat(), dog(0.2)], (), False),
    # Counting, with its own threshold and what is excluded.
    "as many": (THREE, [cat()] * 3, (), True),
    "one fewer": (THREE, [cat()] * 2, (), False),
    "one more": (THREE, [cat()] * 4, (), False),
    "counting score at its threshold": (THREE, [cat()] * 2 + [cat(0.9)], (), False),
    "counting score just above": (THREE, [cat()] * 2 + [cat(JUST_ABOVE[1])], (), True),
    "a fourth at the threshold is not counted": (THREE, [cat()] * 3 + [cat(0.9)], (), True),
    "a fourth just above is counted": (THREE, [cat()] * 3 + [cat(JUST_ABOVE[1])], (), False),
    "0.5 is enough where nothing is counted": (line("two_object", [clause("cat", 2)]), [cat(0.5)] * 2, (), True),
    "others are not counted": (THREE, [cat()] * 3 + [dog()] * 5, (), True),
    # At most 16 of a class.
    "seventeen are sixteen": (line("counting", [clause("cat", 16)], [clause("cat", 17)]), [cat()] * 17, (), True),
    "seventeen are never found": (line("counting", [clause("cat", 17)]), [cat()] * 20, (), False),
    "the limit is each class's own": (
        line("x", [clause("cat", 16), clause("dog", 16)]), [cat(), dog()] * 16, (), True),
    # Exclusion.
    "excluded and there": (line("x", [clause("cat")], [clause("dog")]), [cat(), dog()], (), False),
    "excluded and below the threshold": (line("x", [clause("cat")], [clause("dog")]), [cat(), dog(0.3)], (), True),
    "excluded from two on, one there": (line("x", [clause("cat")], [clause("dog", 2)]), [cat(), dog()], (), True),
    "excluded from two on, two there": (
        line("x", [clause("cat")], [clause("dog", 2)]), [cat(), dog(), dog()], (), False),
    "any exclusion fails": (line("x", [], [clause("cat", 9), clause("dog")]), [dog()], (), False),
    # Colours, of the best `count` alone.
    "the colour": (RED, [cat()], ["red"], True),
    "another colour": (RED, [cat()], ["blue"], False),
    "the best has another colour": (RED, [cat(0.8), cat(0.9)], ["red", "blue"], False),
    "the best has the colour": (RED, [cat(0.8), cat(0.9)], ["blue", "red"], True),
    "of equal scores the later one is looked at": (RED, [cat(), cat()], ["blue", "red"], True),
    "of equal scores the earlier one is not": (RED, [cat(), cat()], ["red", "blue"], False),
    "both have the colour": (TWO_RED, [cat(), cat()], ["red", "red"], True),
    "one of both has the colour": (TWO_RED, [cat(), cat()], ["red", "blue"], False),
    "a third in the colour does not help": (TWO_RED, [cat(0.9), cat(0.8), cat(0.7)], ["red", "blue", "red"], False),
    "nothing to have the colour": (RED, [], (), False),
    "each its colour": (COLORS_OF_TWO, [cat(), dog()], ["red", "blue"], True),
    "colours exchanged": (COLORS_OF_TWO, [cat(), dog()], ["blue", "red"], False),
    "one colour for both": (COLORS_OF_TWO, [cat(), dog()], ["red", "red"], False),
    # Positions: offsets of the centres, shrunk by a tenth of both sizes.
    "left": (placed("left of"), [dog(box=box_at(50, 0)), cat(box=box_at(0, 0))], (), True),
    "left, but right asked": (placed("right of"), [dog(box=box_at(50, 0)), cat(box=box_at(0, 0))], (), False),
    "right": (placed("right of"), [dog(box=box_at(0, 0)), cat(box=box_at(50, 0))], (), True),
    "above": (placed("above"), [dog(box=box_at(0, 50)), cat(box=box_at(0, 0))], (), True),
    "below": (placed("below"), [dog(box=box_at(0, 0)), cat(box=box_at(0, 50))], (), True),
    "above is not left": (placed("left of"), [dog(box=box_at(0, 50)), cat(box=box_at(0, 0))], (), False),
    "at an angle it is above": (placed("above"), [dog(box=box_at(100, 100)), cat(box=box_at(0, 0))], (), True),
    "at an angle it is left too": (placed("left of"), [dog(box=box_at(100, 100)), cat(box=box_at(0, 0))], (), True),
    "the same place": (placed("left of"), [dog(), cat()], (), False),
    "nearer than a tenth of both sizes": (
        placed("left of"), [dog(box=box_at(2, 0)), cat(box=box_at(0, 0))], (), False),
    "a little farther, and half of it is left": (
        placed("left of"), [dog(box=box_at(4.1, 0)), cat(box=box_at(0, 0))], (), True),
    "exactly half is left": (placed("left of"), [dog(box=box_at(4, 0)), cat(box=box_at(0, 0))], (), False),
    "within a thousandth of a pixel": (
        placed("left of"), [dog(box=box_at(2.0009, 0)), cat(box=box_at(0, 0))], (), False),
    "exactly half along one axis": (
        # 3-4-5 triangle without sizes, doubled: shares 0.6 and 0.8; the shrinking of x by 1 of 10 makes it 0.5.
        placed("left of"), [dog(box=box_at(6, 8, 5, 0)), cat(box=box_at(0, 0, 5, 0))], (), False),
    "sizes count along their own axis": (
        placed("left of"), [dog(box=box_at(6, 8, 4, 90)), cat(box=box_at(0, 0, 4, 90))], (), True),
    "no target": (placed("left of"), [cat()], (), False),
    "the target is the best of its class": (
        placed("left of"), [dog(0.5, box_at(50, 0)), dog(0.9, box_at(-50, 0)), cat(0.9, box_at(0, 0))], (), False),
    "every pair must be so": (
        line("position", [clause("dog", 2), clause("cat", position=["left of", 0])]),
        [dog(box=box_at(50, 0)), dog(box=box_at(-50, 0)), cat(box=box_at(0, 0))], (), False),
    "every pair is so": (
        line("position", [clause("dog", 2), clause("cat", position=["left of", 0])]),
        [dog(box=box_at(50, 0)), dog(box=box_at(60, 0)), cat(box=box_at(0, 0))], (), True),
    "a target in the wrong colour is none": (
        line("position", [clause("dog", color="red"), clause("cat", position=["left of", 0])]),
        [dog(box=box_at(50, 0)), cat(box=box_at(0, 0))], ["blue", None], False),
    "a clause twice asks for nothing more": (line("x", [clause("cat"), clause("cat")]), [cat()], (), True),
    "nothing asked, nothing wrong": (line("x", []), [], (), True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_verdicts_on_detections_made_by_hand(case):
    asked, detections, colors, expected = CASES[case]
    right, reason = geneval.judge(asked, detections, colors)
    assert right is expected
    assert bool(reason) is not expected


def test_reasons_say_what_was_expected_and_found():
    assert geneval.judge(THREE, [cat()])[1] == "Expected 3 of 'cat', found 1."
    assert geneval.judge(THREE, [cat()] * 5)[1] == "Expected fewer than 4 of 'cat', found 5."
    assert geneval.judge(RED, [cat()], ["blue"])[1] == "Expected 1 of 'cat' in red, found blue."
    apart = [dog(box=box_at(0, 0)), cat(box=box_at(50, 0))]
    assert geneval.judge(placed("left of"), apart)[1] == "Expected 'cat' left of 'dog', but it is right of it."
    assert geneval.judge(placed("left of"), [dog(), cat()])[1].endswith("but it is in no relation to it.")
    assert geneval.judge(placed("above"), [cat()])[1].splitlines() == [
        "Expected 1 of 'dog', found 0.",
        "There is nothing right for 'cat' to be above.",
    ]


def test_colours_are_needed_of_the_best_detections_alone():
    found = [cat(0.5), dog(), cat(0.9), cat(0.2)]
    assert geneval.colored(RED, found) == [2]
    assert geneval.colored(TWO_RED, found) == [0, 2]
    assert geneval.colored(COLORS_OF_TWO, found) == [1, 2]
    assert geneval.colored(SINGLE, found) == [] and geneval.colored(RED, [dog()]) == []
    with pytest.raises(ValueError, match="The colour of detection 2 is needed"):
        geneval.judge(RED, found)


def angle_to_the_nearest_axis(scene):
    """Degrees. Beyond 30, GenEval lets two relations be true at once, of which the shapes' rule takes the one."""
    dx, dy = (abs(a - b) for a, b in ((scene[0].x, scene[1].x), (scene[0].y, scene[1].y)))
    return math.degrees(math.atan2(min(dx, dy), max(dx, dy)))


def shapes_pictures(n):
    """Prompts, and for each a picture: drawn right for two in three, in two styles, else of a foil."""
    rng = random.Random(5)
    prompts = heldout_prompts(n)
    images = []
    for index, prompt in enumerate(prompts):
        shown = prompt if rng.random() < 0.6 else sample_foil(rng, prompt)
        scene = sample_scene(rng, shown.spec)
        while shown.spec.relation is not None and angle_to_the_nearest_axis(scene) > 30:
            scene = sample_scene(rng, shown.spec)
        images.append(render(scene) if index % 2 else render_soft(scene, rng))
    return prompts, images


def test_verdicts_equal_the_shapes_scorers_on_600_pictures():
    prompts, images = shapes_pictures(600)
    expected = shapes_scorer.score(images, [prompt.spec for prompt in prompts])
    verdicts = []
    for prompt, image in zip(prompts, images, strict=True):
        asked, picture = json.loads(json.dumps(geneval_line(prompt))), Image.fromarray(image)
        (found,) = detect([picture])
        crops = [crop(picture, found[place]) for place in geneval.colored(asked, found)]
        colors: list[str | None] = [None] * len(found)
        for place, color in zip(geneval.colored(asked, found), name_colors(crops), strict=True):
            colors[place] = color
        verdicts.append(geneval.judge(asked, found, colors)[0])
    differing = [(p.caption, e) for p, e, v in zip(prompts, expected, verdicts, strict=True) if e != v]
    assert differing == []
    assert 200 < sum(verdicts) < 500  # of both kinds


def write(path, *lines):
    path.write_text("\n".join(text if isinstance(text, str) else json.dumps(text) for text in lines) + "\n")
    return path


def test_the_file_is_read_as_it_is(tmp_path):
    lines = [SINGLE, placed("above"), COLORS_OF_TWO]
    assert geneval.read_lines(write(tmp_path / "lines.jsonl", *lines, "")) == lines
    bare = {"tag": "x", "include": [clause("cat")], "prompt": "p"}
    assert geneval.read_lines(write(tmp_path / "bare.jsonl", bare)) == [bare]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Prompt\tCategory", "line 1 is not JSON"),
        ("[1, 2]", "line 1 is not a JSON object"),
        ({"id": "coco_1", "caption": "a"}, "there is no 'tag'; there are 'id', 'caption'"),
        ({"tag": "x", "prompt": "p", "include": {}}, "'include' is {}, not of type list"),
        (line("x", [{"class": "cat"}]), "there is no 'count'"),
        (line("x", [clause("cat", "2")]), "'count' is '2', not of type int"),
        (line("x", [clause("cat", 0)]), "'count' is 0"),
        (line("x", [], [{"count": 1}]), "line 1, exclude .* there is no 'class'"),
        (line("x", [clause("cat", position=["behind", 0])]), "not one of left of"),
        (line("x", [clause("cat", position=["above", 0])]), "does not name an earlier clause"),
    ],
)
def test_other_files_are_refused_with_where_to_get_the_right_one(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        geneval.read_lines(write(tmp_path / "other.jsonl", content))
    assert "other.jsonl" in str(caught.value)
    if "position" not in message and "earlier" not in message and "left of" not in message:
        assert "github.com/djghosh13/geneval" in str(caught.value)


def test_no_file_says_where_to_get_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="Download GenEval's evaluation_metadata.jsonl from https://github.com"
    ):
        geneval.read_lines(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="it is empty"):
        geneval.read_lines(write(tmp_path / "empty.jsonl", ""))
