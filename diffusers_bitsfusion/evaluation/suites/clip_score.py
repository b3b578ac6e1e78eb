"""The suite `clip`: CLIP score of any captions, and distances of CLIP features to a reference's images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..clip import Clip, clip_score
from ..compositional import bootstrap_mean
from ..distribution import cmmd, frechet_distance
from ..prompts import Prompt
from .base import ImageScorer, Record, Scores, Suite
from .models import load_model

CLIP = "openai/clip-vit-base-patch32"


class ClipScore(Suite):
    """100 × the cosine of image and caption (arXiv 2104.08718); the paper's figures are this by 100, with ViT-B/32.

    Args:
        prompts: of the images.
        model: folder or Hub id of a CLIP.
    """

    name = "clip"

    def __init__(self, prompts: Sequence[Prompt], model: str = CLIP) -> None:
        self.captions = [prompt.caption for prompt in prompts]
        self.settings = {"model": model}

    def load(self) -> ImageScorer:
        """Load the models, as `Suite.load` says."""
        clip: Clip = load_model(Clip, self.settings["model"], "the CLIP", "--clip")

        def score(indices: Sequence[int], images: np.ndarray) -> tuple[list[Record], np.ndarray]:
            features = clip.image_features(images)
            values = clip_score(features, clip.text_features([self.captions[index] for index in indices]))
            return [{"clip_score": value} for value in values.tolist()], features

        return ImageScorer(score, clip.model.config.projection_dim)

    def values(self, scores: Scores) -> np.ndarray:
        """Return the numbers that `Suite.values` describes."""
        return np.array([record["clip_score"] for record in scores.records])

    def summary(self, values: np.ndarray) -> dict[str, Any]:
        """Return the intervals that `Suite.summary` describes."""
        return {"clip_score": bootstrap_mean(values)}

    def against(self, scores: Scores, reference: Scores) -> dict[str, Any]:
        """Return FID, where there are two images or more, and CMMD of CLIP features."""
        own, other = scores.features, reference.features
        assert own is not None
        assert other is not None
        distances = {"clip_fid": frechet_distance(own, other)} if len(own) > 1 else {}
        return distances | {"cmmd": cmmd(own, other)}
