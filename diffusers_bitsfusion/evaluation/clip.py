"""CLIP: how well an image fits its prompt, and features of images."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from .pipeline import default_device

# Images or captions in one call of the model.
_BATCH = 32


class Clip:
    """A `CLIPModel` with the processors that belong to it.

    Args:
        model: in float32.
        image_processor, tokenizer: of the same checkpoint.
    """

    def __init__(self, model: CLIPModel, image_processor: CLIPImageProcessor, tokenizer: CLIPTokenizer) -> None:
        self.model = model.eval()
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], processors: str | os.PathLike[str] | None = None) -> Clip:
        """Load from a folder or the Hub, in float32 on the default device.

        Args:
            path: of the model.
            processors: of the image processor and tokenizer; `path` when left out.

        Raises:
            OSError: nothing to load there.
            ValueError: the model there is not a CLIP.
        """
        kind = AutoConfig.from_pretrained(path).model_type
        if kind != "clip":
            raise ValueError(f"{path} holds a model of type {kind!r}, not a CLIP.")
        model = CLIPModel.from_pretrained(path).float().to(default_device())
        processors = processors or path
        return cls(model, CLIPImageProcessor.from_pretrained(processors), CLIPTokenizer.from_pretrained(processors))

    @property
    def width(self) -> int:
        """The number d of features."""
        width: int = self.model.config.projection_dim
        return width

    @torch.no_grad()
    def image_features(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Return projected embeddings, not normalized: n of (height, width, 3) uint8 to (n, d) float32."""
        features = []
        for start in range(0, len(images), _BATCH):
            pixels = self.image_processor(list(images[start : start + _BATCH]), return_tensors="pt").pixel_values
            pooled = self.model.vision_model(pixels.to(self.model.device)).pooler_output
            features.append(self.model.visual_projection(pooled))
        return _array(features)

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> np.ndarray:
        """Return projected embeddings, not normalized: n captions, truncated where too long, to (n, d) float32."""
        length = self.model.config.text_config.max_position_embeddings
        features = []
        for start in range(0, len(captions), _BATCH):
            tokens = self.tokenizer(
                list(captions[start : start + _BATCH]),
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            ).to(self.model.device)
            pooled = self.model.text_model(**tokens).pooler_output
            features.append(self.model.text_projection(pooled))
        return _array(features)


def clip_score(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
    """Return 100 × cosine similarity of image and caption, at least 0: two times (n, d) to (n,) float64."""
    return (100 * cosine(image_features, text_features)).clip(min=0)


def cosine(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
    """Return the cosine similarity of each image and its caption: two times (n, d) to (n,) float64."""
    images, texts = (F.normalize(torch.from_numpy(x).double(), dim=-1) for x in (image_features, text_features))
    return (images * texts).sum(-1).numpy()


def _array(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).float().cpu().numpy()
