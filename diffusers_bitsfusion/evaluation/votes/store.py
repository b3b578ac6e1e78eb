"""Votes on disk, a JSON line each, written at once, so that raters continue where they stopped."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.files import write_atomically
from ...utils.json_files import read_json
from ..prompts import Prompt

QUESTIONS = {"better": "Which image is better?", "text": "Which image fits the text better?"}
SOURCE, DESTINATION, NEITHER = "source", "destination", "neither"

_SETTINGS = "vote.json"
_VOTES = "votes.jsonl"


@dataclass(frozen=True)
class Vote:
    """A rater's answer to one of `QUESTIONS` about the images of one prompt.

    Attributes:
        rater: name of the person.
        index: place of the prompt.
        question: key of `QUESTIONS`.
        choice: "source", "destination" or "neither".
    """

    rater: str
    index: int
    question: str
    choice: str


@dataclass(frozen=True)
class Pair:
    """The next question for a rater.

    Attributes:
        index: place of the prompt.
        question: key of `QUESTIONS`.
        sides: whose image is on the left and whose on the right, hidden from the rater.
        answered, total: of the rater's questions.
    """

    index: int
    question: str
    sides: tuple[str, str]
    answered: int
    total: int


class VoteStore:
    """The votes in a folder.

    The order of prompts and of the two images is random for each rater, and the same after a restart.

    Args:
        folder: made by `create`.

    Raises:
        FileNotFoundError: the folder holds no vote.
        ValueError: a line or the settings are damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        note = self.folder / _SETTINGS
        if not note.is_file():
            raise FileNotFoundError(
                f"{self.folder} holds no vote ({_SETTINGS}); start one by `bitsfusion vote SRC DST`."
            )
        content = read_json(note)
        self.settings: dict[str, Any] = content["settings"]
        self.prompts = [Prompt(item["prompt"], item["category"]) for item in content["prompts"]]
        self._salt: int = content["salt"]
        self._lock = threading.Lock()
        self.votes = self._read()
        self._given = {(vote.rater, vote.index, vote.question) for vote in self.votes}

    @classmethod
    def create(
        cls, folder: str | os.PathLike[str], prompts: Sequence[Prompt], settings: Mapping[str, Any]
    ) -> VoteStore:
        """Open the vote in a folder, or start one there.

        Args:
            folder: made where it is missing.
            prompts: what the images show, with categories or without.
            settings: JSON-safe; all that the images depend on.

        Raises:
            ValueError: the folder holds a vote on other images.
        """
        path = Path(folder) / _SETTINGS
        content = {
            "settings": dict(settings),
            "prompts": [{"prompt": prompt.caption, "category": prompt.category} for prompt in prompts],
        }
        if path.is_file():
            found = read_json(path)
            if any(found.get(key) != value for key, value in content.items()):
                raise ValueError(f"{folder} holds a vote on other images; choose another folder (--out).")
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            salt = int.from_bytes(os.urandom(4), "little")
            write_atomically(path, json.dumps(content | {"salt": salt}, indent=2) + "\n")
        return cls(folder)

    def next(self, rater: str) -> Pair | None:
        """Return the next question for a rater, None where everything is answered."""
        rng = np.random.default_rng([self._salt, *rater.encode()])
        order = rng.permutation(len(self.prompts))
        swapped = rng.random(len(self.prompts)) < 0.5
        total = len(order) * len(QUESTIONS)
        items = [(int(index), question) for index in order for question in QUESTIONS]
        left = [item for item in items if (rater, *item) not in self._given]
        if not left:
            return None
        index, question = left[0]
        sides = (DESTINATION, SOURCE) if swapped[index] else (SOURCE, DESTINATION)
        return Pair(index, question, sides, total - len(left), total)

    def add(self, vote: Vote) -> None:
        """Write a vote to the disk; a second one on the same question, as from a second tab, is left out."""
        with self._lock:
            key = (vote.rater, vote.index, vote.question)
            if key in self._given:
                return
            with open(self.folder / _VOTES, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(vote)) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            self._given.add(key)
            self.votes.append(vote)

    def _read(self) -> list[Vote]:
        path = self.folder / _VOTES
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):  # A killed process did not finish this line.
            text = text[: text.rfind("\n") + 1]
            path.write_text(text, encoding="utf-8")
        votes = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                votes.append(Vote(**json.loads(line)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}, is damaged: {line!r}.") from error
        return votes
