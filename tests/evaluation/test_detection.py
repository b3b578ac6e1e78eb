"""What GenEval's judge looks at: a tiny random Mask2Former, colours by a tiny random CLIP, and plug-ins."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from diffusers_bitsfusion.evaluation.clip import Clip
from diffusers_bitsfusion.evaluation.suites import detection

NAMES = ["person", "mouse", "remote", "keyboard", "tv"]


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mask2former")
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=7,
        id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))


def test_detections_are_the_models_at_the_pictures_own_size(detector_folder, picture, one_thread):
    detector = detection.Mask2FormerDetector(str(detector_folder))
    (found,) = detector([picture])
    with torch.no_grad():
        pixels = detector.processor(images=picture, return_tensors="pt").pixel_values
        output = detector.model(pixel_values=pixels)
    probabilities = output.class_queries_logits[0].double().softmax(-1).numpy()
    logits = (
        torch.nn.functional.interpolate(output.masks_queries_logits, (40, 56), mode="bilinear")[0].double().numpy()
    )
    expected = []
    for query in range(7):
        inside = logits[query] > 0
        if not inside.any():
            continue
        certainty = (1 / (1 + np.exp(-logits[query][inside]))).mean()
        rows, columns = np.nonzero(inside)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        for label in range(len(NAMES)):
            expected.append((probabilities[query, label] * certainty, label, box, inside))
    assert len(found) == len(expected) > 0
    for mine, (score, label, box, inside) in zip(
        sorted(found, key=lambda d: d.score), sorted(expected, key=lambda e: e[0]), strict=True
    ):
        assert mine.score == pytest.approx(score, rel=1e-4)
        assert mine.class_name == ["person", "computer mouse", "tv remote", "computer keyboard", "tv"][label]
        assert mine.box == box and (mine.mask == inside).all() and mine.mask.dtype == bool


def test_several_pictures_give_what_each_gives_alone(detector_folder, picture, one_thread):
    detector = detection.Mask2FormerDetector(str(detector_folder))
    small = picture.resize((24, 24))
    together = detector([picture, small])
    alone = [detector([image])[0] for image in (picture, small)]
    assert [[d.score for d in found] for found in together] == [[d.score for d in found] for found in alone]


def test_a_detector_without_the_classes_is_refused(detector_folder):
    assert detection.load_detector(str(detector_folder), {"person", "computer mouse"})
    with pytest.raises(ValueError, match="does not know 2 of the classes that the prompts name, first 'bench'"):
        detection.load_detector(str(detector_folder), {"person", "bench", "zebra"})


def test_a_model_that_is_not_there_says_what_to_download():
    message = r"The detector, me/nothing, cannot be loaded .* `hf download me/nothing`.*--detector"
    with pytest.raises(OSError, match=message):
        detection.load_detector("me/nothing", set())


def test_colours_are_the_nearest_sentences_mean(clip_folder, one_thread):
    crops = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)) for i in range(3)]
    classify = detection.ClipColors(str(clip_folder))
    clip = Clip.from_pretrained(clip_folder)
    expected = []
    for crop, name in zip(crops, ["cat", "dog", "cat"], strict=True):
        image = clip.image_features([np.asarray(crop)])[0].astype(float)
        scores = []
        for color in detection.COLORS:
            looks = [f"{color} {name}", f"{color}-colored {name}", f"{color} object"]
            texts = clip.text_features([f"a photo of a {look}" for look in looks]).astype(float)
            mean = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).mean(0)
            scores.append(image @ mean / np.linalg.norm(image) / np.linalg.norm(mean))
        expected.append(detection.COLORS[int(np.argmax(scores))])
    assert classify(crops, ["cat", "dog", "cat"]) == expected
    assert classify([], []) == []


def test_crops_are_grey_outside_of_the_mask():
    image = Image.new("RGB", (10, 8), (200, 10, 10))
    mask = np.zeros((8, 10), bool)
    mask[3:5, 4:6] = True
    cut = np.asarray(detection.crop(image, ("cat", 1, (3, 2, 7, 6), mask)))
    assert cut.shape == (4, 4, 3)
    assert (cut[1:3, 1:3] == (200, 10, 10)).all() and (cut == 0x99).all(-1).sum() == 12
    whole = np.asarray(detection.crop(image, ("cat", 1, (2.6, 2.4, 7.2, 5.6), None)))
    assert whole.shape == (4, 4, 3) and (whole == (200, 10, 10)).all()
    assert detection.crop(image, ("cat", 1, (2.1, 2.1, 2.3, 2.3), None)).size == (1, 1)


def plug_in(monkeypatch, **functions):
    module = ModuleType("plugged")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "plugged", module)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "must return 1 lists"),
        ([[("cat", 1.0, (0, 0, 1, 1))]], r"a detection is \(class name, score"),
        ([[("cat", 1.0, (0, 0, 1), None)]], r"a detection is \(class name, score"),
        ([[("cat", 1.0, (5, 0, 1, 1), None)]], "with x0 < x1 and y0 < y1"),
        ([[("cat", 1.0, (0, 0, 1, 1), np.zeros((3, 3), bool))]], r"\(height, width\), \(40, 56\)"),
    ],
)
def test_wrong_detections_of_a_plug_in_are_refused(monkeypatch, picture, found, message):
    plug_in(monkeypatch, detect=lambda images: found)
    with pytest.raises(ValueError, match=message):
        detection.load_detector("plugged:detect", set())([picture])


def test_wrong_colours_of_a_plug_in_are_refused(monkeypatch, picture):
    plug_in(monkeypatch, colors=lambda crops: ["red"])
    classify = detection.load_color_classifier("plugged:colors")
    assert classify([picture], ["cat"]) == ["red"] and classify([], []) == []
    with pytest.raises(ValueError, match="must return 2 names, one a crop"):
        classify([picture, picture], ["cat", "cat"])
    with pytest.raises(ValueError, match="has no function 'nothing'"):
        detection.load_color_classifier("plugged:nothing")
