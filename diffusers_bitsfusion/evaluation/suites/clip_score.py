"""The suite `clip`: CLIP score of any captions, and distances of CLIP features to a reference's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..clip import Clip, clip_score
from ..compositional import bootstrap_mean
from ..distribution import cmmd, frechet_distance
from ..prompts import Prompt
from .base import PictureScorer, Record, Scores, Suite
from .models import load_model

CLIP = "openai/clip-vit-base-patch32"


class ClipScore(Suite):
    """100 × the cosine of picture and caption (arXiv 2104.08718); the paper's figures are this by 100, with ViT-B/32.

    Args:
        prompts: what to draw.
        model: folder or Hub id of a CLIP.
    """

    name = "clip"

    def __init__(self, prompts: Sequence[Prompt], model: str = CLIP) -> None:
        self.captions = [prompt.caption for prompt in prompts]
        self.settings = {"model": model}

    def load(self) -> PictureScorer:
        """See `Suite.load`."""
        clip: Clip = load_model(Clip, self.settings["model"], "the CLIP", "--clip")

        def score(indices: Sequence[int], images: np.ndarray) -> tuple[list[Record], np.ndarray]:
            features = clip.image_features(images)
            values = clip_score(features, clip.text_features([self.captions[index] for index in indices]))
            return [{"clip_score": value} for value in values.tolist()], features

        return PictureScorer(score, clip.model.config.projection_dim)

    def values(self, scores: Scores) -> np.ndarray:
        """See `Suite.values`."""
        return np.array([record["clip_score"] for record in scores.records])

    def summary(self, values: np.ndarray) -> dict[str, Any]:
        """See `Suite.summary`."""
        return {"clip_score": bootstrap_mean(values)}

    def against(self, scores: Scores, reference: Scores) -> dict[str, Any]:
        """Return FID, where there are two pictures or more, and CMMD of CLIP features."""
        own, other = scores.features, reference.features
        assert own is not None and other is not None
        distances = {"clip_fid": frechet_distance(own, other)} if len(own) > 1 else {}
        return distances | {"cmmd": cmmd(own, other)}
