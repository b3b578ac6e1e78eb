"""TIFA (arXiv 2303.11897): questions about a picture, answered by a model, with the answers that the caption implies.

The benchmark's two files, github.com/Yushi-Hu/tifa: the texts (`id`, `caption`) and the questions (`id` of the text,
`question`, `choices`, `answer`, `element_type`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..compositional import OVERALL, bootstrap_mean
from .base import PictureScorer, Record, Scores, Suite
from .json_files import read_json, require_fields, wrong_file

TEXTS, QUESTIONS = "tifa_v1.0_text_inputs.json", "tifa_v1.0_question_answers.json"
SOURCE = "https://github.com/Yushi-Hu/tifa/tree/main/tifa_v1.0"


@dataclass(frozen=True)
class Question:
    """A question about a picture, the answers to choose from, the right one, and what kind of thing it is about."""

    question: str
    choices: tuple[str, ...]
    answer: str
    element_type: str


@dataclass(frozen=True)
class Text:
    """A caption with its questions."""

    caption: str
    questions: tuple[Question, ...]


def read_texts(texts: str | os.PathLike[str], questions: str | os.PathLike[str]) -> list[Text]:
    """Read the benchmark's two files, or two of the same format; texts without questions are left out.

    Raises:
        OSError: a file cannot be read.
        ValueError: one is another file, has an id twice, or the two do not belong together.
    """
    captions = _captions(texts)
    asked: dict[str, list[Question]] = {}
    what = f"TIFA's {QUESTIONS}"
    fields = {"id": str, "question": str, "choices": list, "answer": str, "element_type": str}
    for number, item in enumerate(_entries(questions, what), start=1):
        where = f"{questions}, entry {number}"
        require_fields(item, fields, where, what, SOURCE)
        if item["id"] not in captions:
            raise wrong_file(where, what, SOURCE, f"its id {item['id']!r} is not in {texts}")
        question = Question(item["question"], tuple(item["choices"]), item["answer"], item["element_type"])
        asked.setdefault(item["id"], []).append(question)
    return [Text(captions[name], tuple(asked[name])) for name in captions if name in asked]


class Tifa(Suite):
    """The mean over captions of the share of questions answered rightly, and by element type that of all questions.

    Args:
        texts: of `read_texts`.
        vqa: folder or Hub id of a model of transformers for visual question answering, or MODULE:FUNCTION, which takes
            a list of PIL images and one of as many questions and returns the answers.
        sentence_encoder: folder or Hub id of the encoder that takes an answer outside the choices to the nearest of
            them.
    """

    name = "tifa"

    def __init__(self, texts: Sequence[Text], vqa: str, sentence_encoder: str) -> None:
        self.captions = [text.caption for text in texts]
        self.settings = {"vqa": vqa, "sentence_encoder": sentence_encoder}
        self._texts = list(texts)

    def load(self) -> PictureScorer:
        """See `Suite.load`."""
        from .answers import load_chooser, load_vqa

        answer, choose = load_vqa(self.settings["vqa"]), load_chooser(self.settings["sentence_encoder"])

        def score(indices: Sequence[int], images: np.ndarray) -> tuple[list[Record], None]:
            records: list[Record] = []
            for index, image in zip(indices, images, strict=True):
                questions = self._texts[index].questions
                said = answer(image, [question.question for question in questions])
                chosen = [choose(text, q.choices) for text, q in zip(said, questions, strict=True)]
                right = [text == q.answer for text, q in zip(chosen, questions, strict=True)]
                records.append({"answers": said, "chosen": chosen, "right": right})
            return records, None

        return PictureScorer(score)

    def values(self, scores: Scores) -> np.ndarray:
        """Return 1 for every question answered rightly, 0 for every other, in the order of the captions."""
        return np.concatenate([record["right"] for record in scores.records]).astype(np.float64)

    def summary(self, values: np.ndarray) -> dict[str, Any]:
        """See `Suite.summary`."""
        ends = np.cumsum([len(text.questions) for text in self._texts])[:-1]
        shares = np.array([part.mean() for part in np.split(values, ends)])
        types = [question.element_type for text in self._texts for question in text.questions]
        by_type = {name: bootstrap_mean(values[np.array(types) == name]) for name in dict.fromkeys(types)}
        return {self.name: {OVERALL: bootstrap_mean(shares)} | by_type}


def _captions(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the captions by id."""
    what = f"TIFA's {TEXTS}"
    captions: dict[str, str] = {}
    for number, item in enumerate(_entries(path, what), start=1):
        where = f"{path}, entry {number}"
        require_fields(item, {"id": str, "caption": str}, where, what, SOURCE)
        if "question" in item:
            raise wrong_file(where, what, SOURCE, "it has a 'question', as the file of the questions has")
        if item["id"] in captions:
            raise wrong_file(where, what, SOURCE, f"the id {item['id']!r} is there twice")
        captions[item["id"]] = item["caption"]
    return captions


def _entries(path: str | os.PathLike[str], what: str) -> list[Any]:
    content = read_json(path, what, SOURCE)
    if not isinstance(content, list) or not content:
        raise wrong_file(path, what, SOURCE, "it is not a list of entries")
    return content
