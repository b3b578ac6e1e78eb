"""Answers to questions about pictures, and the nearest of the answers to choose from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoModelForVisualQuestionAnswering, AutoProcessor, AutoTokenizer

from ..pipeline import default_device
from ..plugins import is_function, load_function
from .models import load_model

VQA = "Salesforce/blip-vqa-capfilt-large"
SENTENCE_ENCODER = "sentence-transformers/all-mpnet-base-v2"

Answerer = Callable[[np.ndarray, Sequence[str]], list[str]]
Chooser = Callable[[str, Sequence[str]], str]

_BATCH = 16
_LONGEST = 50  # tokens of an answer


def load_vqa(name: str) -> Answerer:
    """Return what answers questions about one picture, (height, width, 3) uint8.

    Args:
        name: folder or Hub id of a model that transformers' auto class for visual question answering loads, whether it
            writes (BLIP) or classifies (ViLT); or MODULE:FUNCTION, see `Tifa`.

    Raises:
        OSError, ValueError: there is no such model or function.
    """
    if not is_function(name):
        return _Model(name)
    function = load_function(name, "VQA")

    def answer(image: np.ndarray, questions: Sequence[str]) -> list[str]:
        answers = list(function([Image.fromarray(image)] * len(questions), list(questions)))
        if len(answers) != len(questions) or not all(isinstance(text, str) for text in answers):
            raise ValueError(f"The VQA {name!r} must return {len(questions)} strings, an answer each question.")
        return answers

    return answer


def load_chooser(path: str) -> Chooser:
    """Return what takes an answer to the choice that it is, or else to the one of the nearest meaning.

    Args:
        path: folder or Hub id of a sentence encoder, whose embedding is the mean of its tokens'.

    Raises:
        OSError: there is no such model.
    """
    part = ("the sentence encoder", "--sentence-encoder")
    model = load_model(AutoModel, path, *part).eval().to(default_device())
    tokenizer = load_model(AutoTokenizer, path, *part)

    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(model.device)
        mask = tokens["attention_mask"][..., None]
        return F.normalize((model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)

    def choose(answer: str, choices: Sequence[str]) -> str:
        if answer in choices:
            return answer
        embedded = embed([answer, *choices])
        return choices[int((embedded[1:] @ embedded[0]).argmax())]

    return choose


class _Model:
    def __init__(self, path: str) -> None:
        part = ("the model that answers questions", "--vqa")
        self.model = load_model(AutoModelForVisualQuestionAnswering, path, *part).eval().to(default_device())
        self.processor = load_model(AutoProcessor, path, *part)

    @torch.no_grad()
    def __call__(self, image: np.ndarray, questions: Sequence[str]) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(questions), _BATCH):
            batch = list(questions[start : start + _BATCH])
            inputs = self.processor(
                images=[Image.fromarray(image)] * len(batch),
                text=batch,
                padding=True,
                truncation=True,
                return_tensors="pt",
            ).to(self.model.device)
            answers += self._answers(inputs)
        return answers

    def _answers(self, inputs) -> list[str]:
        if self.model.can_generate():
            written = self.model.generate(**inputs, max_length=_LONGEST)
            return [text.strip() for text in self.processor.batch_decode(written, skip_special_tokens=True)]
        return [self.model.config.id2label[index] for index in self.model(**inputs).logits.argmax(-1).tolist()]
