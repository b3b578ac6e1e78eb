from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from diffusers_bitsfusion.evaluation import Clip, clip_score


def test_score_is_that_of_the_whole_model(clip_folder):
    clip = Clip.from_pretrained(clip_folder)
    images = np.random.default_rng(0).integers(0, 256, (35, 20, 20, 3), np.uint8)
    captions = ["ab c", "d", "a" * 60] * 11 + ["x", "y"]
    scores = clip_score(clip.image_features(images), clip.text_features(captions))

    processor = CLIPProcessor.from_pretrained(clip_folder)
    options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": 16}
    inputs = processor(text=captions, images=[Image.fromarray(image) for image in images], **options)
    with torch.no_grad():
        output = CLIPModel.from_pretrained(clip_folder)(**inputs)
    expected = 100 * torch.cosine_similarity(output.image_embeds, output.text_embeds).clamp(min=0)
    assert scores.shape == (35,) and expected.max() > 0
    np.testing.assert_allclose(scores, expected, atol=1e-3)


def test_score_by_hand():
    images, texts = np.array([[3.0, 4.0], [1.0, 0.0]], np.float32), np.array([[1.0, 0.0], [-2.0, 0.0]], np.float32)
    np.testing.assert_allclose(clip_score(images, texts), [60, 0], atol=1e-5)


def test_other_models_are_refused(source_folder):
    with pytest.raises(ValueError, match="of type 'clip_text_model', not a CLIP"):
        Clip.from_pretrained(source_folder / "text_encoder")
