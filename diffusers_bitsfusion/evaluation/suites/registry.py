"""The suites by name, made of the files and models that a user names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from ..prompts import Prompt, sample_prompts
from . import geneval, tifa
from .base import Suite
from .captions import PARTI_PROMPTS, read_caption_file
from .clip_score import CLIP, ClipScore
from .preference import preference_suite

T = TypeVar("T")


@dataclass(frozen=True)
class SuiteFiles:
    """What the suites are made of; None stands for a suite's published model.

    A file is a path, or of a data set on the Hub OWNER/NAME, whose file has the published name, or OWNER/NAME/FILE.
    Every model is a folder or Hub id.

    Attributes:
        prompts: captions for `clip`, `pickscore` and `hpsv2`, see `read_caption_file`.
        geneval_prompts: GenEval's `evaluation_metadata.jsonl`.
        tifa_prompts, tifa_questions: TIFA's texts and questions.
        detector, color_classifier: of `geneval`, see `GenEval`.
        vqa, sentence_encoder: of `tifa`, see `Tifa`.
        clip, pickscore, hpsv2: the models of the suites so called.
        num_images: draw so many of each suite's prompts, of a shorter file and for None all.
    """

    prompts: str | None = None
    geneval_prompts: str | None = None
    tifa_prompts: str | None = None
    tifa_questions: str | None = None
    detector: str | None = None
    color_classifier: str | None = None
    vqa: str | None = None
    sentence_encoder: str | None = None
    clip: str | None = None
    pickscore: str | None = None
    hpsv2: str | None = None
    num_images: int | None = None


def load_suites(names: Sequence[str], files: SuiteFiles) -> list[Suite]:
    """Return the suites of those names, their prompts read; models are loaded later.

    Raises:
        OSError: a file cannot be read or downloaded.
        ValueError: no such suite, or a file is missing or not what the suite needs.
    """
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        raise ValueError(f"There is no suite {unknown[0]!r}; choose of {', '.join(SUITES)}.")
    return [SUITES[name](files) for name in dict.fromkeys(names)]


def _geneval(files: SuiteFiles) -> Suite:
    from .detection import COLOR_CLIP, DETECTOR

    path = _file(files.geneval_prompts, "--geneval-prompts", geneval.FILE, geneval.SOURCE)
    lines = _some(geneval.read_lines(path), files.num_images)
    return geneval.GenEval(lines, files.detector or DETECTOR, files.color_classifier or COLOR_CLIP)


def _tifa(files: SuiteFiles) -> Suite:
    from .answers import SENTENCE_ENCODER, VQA

    texts = tifa.read_texts(
        _file(files.tifa_prompts, "--tifa-prompts", tifa.TEXTS, tifa.SOURCE),
        _file(files.tifa_questions, "--tifa-questions", tifa.QUESTIONS, tifa.SOURCE),
    )
    chosen = _some(texts, files.num_images)
    return tifa.Tifa(chosen, files.vqa or VQA, files.sentence_encoder or SENTENCE_ENCODER)


def _clip(files: SuiteFiles) -> Suite:
    return ClipScore(_prompts(files), files.clip or CLIP)


def _pickscore(files: SuiteFiles) -> Suite:
    return preference_suite("pickscore", _prompts(files), files.pickscore)


def _hpsv2(files: SuiteFiles) -> Suite:
    return preference_suite("hpsv2", _prompts(files), files.hpsv2)


SUITES: dict[str, Callable[[SuiteFiles], Suite]] = {
    "geneval": _geneval,
    "tifa": _tifa,
    "clip": _clip,
    "pickscore": _pickscore,
    "hpsv2": _hpsv2,
}


def _prompts(files: SuiteFiles) -> list[Prompt]:
    path = _file(files.prompts, "--prompts", "PartiPrompts.tsv", PARTI_PROMPTS)
    return _some(read_caption_file(path), files.num_images)


def _some(items: list[T], count: int | None) -> list[T]:
    """Return `count` of them: the suites' files differ in length, so that a shorter one gives all it has."""
    return sample_prompts(items, None if count is None else min(count, len(items)))


def _file(name: str | None, option: str, published: str, source: str) -> str:
    """Return the path of a file that a user names by path or by its place on the Hub."""
    if name is None:
        raise ValueError(f"{published} is needed: download it from {source} and give it with {option}.")
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if os.path.exists(name) or not repository or os.path.isabs(name) or Path(name).parts[0] in (".", ".."):
        return name
    try:
        return hf_hub_download(f"{owner}/{repository}", file or published, repo_type="dataset")
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"There is no file {name}, and no data set {owner}/{repository} with the file {file or published} can be "
            f"read from the Hub ({str(error).splitlines()[0]}). Download {published} from {source}."
        ) from error
