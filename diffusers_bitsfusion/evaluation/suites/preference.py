"""The suites `pickscore` and `hpsv2`: models of people's preference, as win rates against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..clip import Clip, cosine
from ..compositional import bootstrap_mean, bootstrap_scores
from ..prompts import Prompt
from .base import PictureScorer, Record, Scores, Suite
from .models import load_model

PICKSCORE = "yuvalkirstain/PickScore_v1"
HPSV2 = "adams-story/HPSv2-hf"

# Both were trained from this CLIP, whose processors they share.
_PROCESSORS = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class Preference(Suite):
    """How often a picture is preferred to the reference's of the same caption and seed; a tie counts half.

    The scores are 100 × the cosine of picture and caption, as both models' are usually given.

    Args:
        name: "pickscore" (arXiv 2305.01569) or "hpsv2" (arXiv 2306.09341), by which the score is called.
        prompts: what to draw; categories are reported where all have one.
        model: folder or Hub id of a `CLIPModel`.
        processors: folder or Hub id of what belongs to it; the model's own when left out.
    """

    needs_reference = True

    def __init__(self, name: str, prompts: Sequence[Prompt], model: str, processors: str | None = None) -> None:
        self.name = name
        self.captions = [prompt.caption for prompt in prompts]
        self.settings = {"model": model, "processors": processors or model}
        self._categories = [prompt.category for prompt in prompts]

    def load(self) -> PictureScorer:
        """See `Suite.load`."""
        clip = load_model(_With(self.settings["processors"]), self.settings["model"], "the model", f"--{self.name}")

        def score(indices: Sequence[int], images: np.ndarray) -> tuple[list[Record], None]:
            texts = clip.text_features([self.captions[index] for index in indices])
            return [{"score": value} for value in (100 * cosine(clip.image_features(images), texts)).tolist()], None

        return PictureScorer(score)

    def values(self, scores: Scores) -> np.ndarray:
        """See `Suite.values`."""
        return np.array([record["score"] for record in scores.records])

    def summary(self, values: np.ndarray) -> dict[str, Any]:
        """See `Suite.summary`."""
        return {self.name: bootstrap_mean(values)}

    def against(self, scores: Scores, reference: Scores) -> dict[str, Any]:
        """Return the win rate, of all captions alike, and by category."""
        difference = self.values(scores) - self.values(reference)
        wins = (np.sign(difference) + 1) / 2
        by_category = bootstrap_scores(wins, self._categories)
        return {"win_rate": by_category | {"overall": bootstrap_mean(wins)}}


class _With:
    """Loads a `Clip` with the processors of another checkpoint, as `load_model` wants it."""

    def __init__(self, processors: str) -> None:
        self._processors = processors

    def from_pretrained(self, path: str) -> Clip:
        return Clip.from_pretrained(path, self._processors)


def preference_suite(name: str, prompts: Sequence[Prompt], model: str | None = None) -> Preference:
    """Return the suite of that name, with its published model where `model` is None."""
    published = {"pickscore": PICKSCORE, "hpsv2": HPSV2}[name]
    return Preference(name, prompts, published, _PROCESSORS) if model is None else Preference(name, prompts, model)
