"""GenEval's judge (arXiv 2310.11513): whether the objects detected in an image are those that its prompt names.

The prompts come from the benchmark's own file, `evaluation_metadata.jsonl` of github.com/djghosh13/geneval, a JSON
object a line: `tag` (the task), `include` (what must be there), `exclude` (what must not) and `prompt`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..compositional import bootstrap_scores
from .base import ImageScorer, Record, Scores, Suite
from .benchmark_files import read_benchmark_lines, require_fields, wrong_file

FILE = "evaluation_metadata.jsonl"
SOURCE = "https://github.com/djghosh13/geneval/tree/main/prompts"
RELATIONS = ("left of", "right of", "above", "below")

# Scores that a detection must exceed, in counting tasks the second; the benchmark's.
_SCORE, _COUNTING_SCORE = 0.3, 0.9
# Detections of a class that are judged; the benchmark's.
_MAX_DETECTIONS = 16
# Share of the sum of both sizes that is subtracted from the distance of two centres; the benchmark's.
_SHRINK = 0.1
# Pixels of distance below which two centres are in no relation; the benchmark's.
_NEAR = 1e-3
# Smallest share of the distance along an axis that makes a relation; the benchmark's.
_RELATED = 0.5

Line = Mapping[str, Any]


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the benchmark's file, or one of the same format.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file; the message says where to get it.
    """
    lines = read_benchmark_lines(path, f"GenEval's {FILE}", SOURCE)
    for number, line in enumerate(lines, start=1):
        _check(line, f"{path}, line {number}")
    return lines


def judge(line: Line, detections: Sequence[Sequence[Any]], colors: Sequence[str | None] = ()) -> tuple[bool, str]:
    """Judge one image by the benchmark's rules.

    Detections that do not score above 0.3 (in counting tasks above 0.9) are dropped, and of a class at most 16 are
    kept, the best first. Of equal scores the later one counts as the better, as in the benchmark. Every clause of
    `include` uses the first `count` detections of its class, of which as many must have the colour, and each lie in
    the relation to each detection of the clause that it names. A clause of `exclude` fails where `count` are found.

    Args:
        line: of `read_lines`.
        detections: (class name, score, box x0 y0 x1 y1, mask or None) each.
        colors: the colour of each detection, None where it was not looked at; needed for those in `colored`.

    Returns:
        Whether the image is right, and otherwise what is wrong, a sentence a line.

    Raises:
        ValueError: a colour that the line requires is missing.
    """
    kept = _kept(line, detections)
    reasons: list[str] = []
    groups: list[list[int] | None] = []  # These are the detections that fulfil each clause.
    for clause in line.get("include", ()):
        found = kept.get(clause["class"], [])[: clause["count"]]
        reason = _missing(clause, found, detections, colors, groups)
        groups.append(None if reason else found)
        if reason:
            reasons.append(reason)
    for clause in line.get("exclude", ()):
        number = len(kept.get(clause["class"], []))
        if number >= clause["count"]:
            reasons.append(f"Expected fewer than {clause['count']} of {clause['class']!r}, found {number}.")
    return not reasons, "\n".join(reasons)


def colored(line: Line, detections: Sequence[Sequence[Any]]) -> list[int]:
    """Return the places of the detections whose colours `judge` will look at."""
    kept = _kept(line, detections)
    clauses = [clause for clause in line.get("include", ()) if "color" in clause]
    places = [kept.get(clause["class"], [])[: clause["count"]] for clause in clauses]
    enough = [found for found, clause in zip(places, clauses, strict=True) if len(found) == clause["count"]]
    return sorted({place for found in enough for place in found})


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Return how the first box lies to the second: none, one or two of `RELATIONS`."""
    first, second = (np.asarray(corners, np.float64).reshape(2, 2) for corners in (box, other))
    offset = first.mean(axis=0) - second.mean(axis=0)
    sizes = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - _SHRINK * sizes, 0)
    if (np.abs(shrunk) < _NEAR).all():
        return set()
    right, down = shrunk / np.linalg.norm(offset)
    holds = (right < -_RELATED, right > _RELATED, down < -_RELATED, down > _RELATED)
    return {relation for relation, true in zip(RELATIONS, holds, strict=True) if true}


class GenEval(Suite):
    """The mean over the tasks of the share of right images, and each task's.

    Args:
        lines: of `read_lines`.
        detector: folder or Hub id of a Mask2Former, or MODULE:FUNCTION, which accepts a list of PIL images and returns
            for each a list of (class name, score, box x0 y0 x1 y1, mask or None).
        color_classifier: folder or Hub id of a CLIP, or MODULE:FUNCTION, which accepts a list of crops as PIL images
            and returns the name of each one's colour.
    """

    name = "geneval"

    def __init__(self, lines: Sequence[Line], detector: str, color_classifier: str) -> None:
        self.captions = [line["prompt"] for line in lines]
        self.settings = {"detector": detector, "color_classifier": color_classifier}
        self.note = (
            f"Objects were found by {detector}, not by the benchmark's own detector (mmdet): the values differ from "
            "published ones, and are to be compared with a reference's, sampled and judged alike."
        )
        self._lines = list(lines)

    def load(self) -> ImageScorer:
        """Load the models, as `Suite.load` says."""
        from .detection import crop, load_color_classifier, load_detector

        clauses = [clause for line in self._lines for clause in (*line["include"], *line.get("exclude", ()))]
        detector = load_detector(self.settings["detector"], {clause["class"] for clause in clauses})
        classify = load_color_classifier(self.settings["color_classifier"])

        def score(indices: Sequence[int], images: np.ndarray) -> tuple[list[Record], None]:
            pil_images = [Image.fromarray(image) for image in images]
            records: list[Record] = []
            for index, image, found in zip(indices, pil_images, detector(pil_images), strict=True):
                places = colored(self._lines[index], found)
                names = classify([crop(image, found[place]) for place in places], [found[p][0] for p in places])
                colors: list[str | None] = [None] * len(found)
                for place, name in zip(places, names, strict=True):
                    colors[place] = name
                right, reason = judge(self._lines[index], found, colors)
                records.append({"right": right, "reason": reason})
            return records, None

        return ImageScorer(score)

    def values(self, scores: Scores) -> np.ndarray:
        """Return the numbers that `Suite.values` describes."""
        return np.array([record["right"] for record in scores.records], np.float64)

    def summary(self, values: np.ndarray) -> dict[str, Any]:
        """Return the intervals that `Suite.summary` describes."""
        return {self.name: bootstrap_scores(values, [line["tag"] for line in self._lines])}


def _kept(line: Line, detections: Sequence[Sequence[Any]]) -> dict[str, list[int]]:
    """Return the places of the detections that count, by class, the best first."""
    threshold = _COUNTING_SCORE if line["tag"] == "counting" else _SCORE
    best_first = sorted(range(len(detections)), key=lambda place: (detections[place][1], place), reverse=True)
    kept: dict[str, list[int]] = {}
    for place in best_first:
        if detections[place][1] > threshold:
            kept.setdefault(detections[place][0], []).append(place)
    return {name: places[:_MAX_DETECTIONS] for name, places in kept.items()}


def _missing(
    clause: Mapping[str, Any],
    found: list[int],
    detections: Sequence[Sequence[Any]],
    colors: Sequence[str | None],
    groups: list[list[int] | None],
) -> str | None:
    """Return what is missing for a clause of `include`, or None where it is fulfilled."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"Expected {count} of {name!r}, found {len(found)}."
    if "color" in clause:
        named = [_color(colors, place) for place in found]
        if named.count(clause["color"]) < count:
            return f"Expected {count} of {name!r} in {clause['color']}, found {', '.join(named)}."
    if "position" in clause:
        relation, index = clause["position"]
        targets = groups[index]
        if targets is None:
            return f"There is nothing right for {name!r} to be {relation}."
        for place in found:
            for target in targets:
                true = relations(detections[place][2], detections[target][2])
                if relation not in true:
                    said = " and ".join(sorted(true)) or "in no relation to"
                    return f"Expected {name!r} {relation} {detections[target][0]!r}, but it is {said} it."
    return None


def _color(colors: Sequence[str | None], place: int) -> str:
    color = colors[place] if place < len(colors) else None
    if color is None:
        raise ValueError(f"The colour of detection {place} is needed; give one for each that `colored` names.")
    return color


def _check(line: dict[str, Any], where: str) -> None:
    require_fields(line, {"tag": str, "prompt": str, "include": list}, where, f"GenEval's {FILE}", SOURCE)
    for part in ("include", "exclude"):
        for clause in line.get(part, []):
            require_fields(clause, {"class": str, "count": int}, f"{where}, {part}", f"GenEval's {FILE}", SOURCE)
            if clause["count"] < 1:
                raise wrong_file(f"{where}, {part}", f"GenEval's {FILE}", SOURCE, f"'count' is {clause['count']}")
    for index, clause in enumerate(line["include"]):
        position = clause.get("position")
        if position is None:
            continue
        if not (isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS):
            raise ValueError(f"{where}: the position {position!r} is not one of {', '.join(RELATIONS)} with an index.")
        if position[1] not in range(index):
            raise ValueError(f"{where}: the position {position!r} does not name an earlier clause by its index.")
