"""The input of GenEval's judge: objects detected by Mask2Former, and their colours classified by CLIP."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

from ..clip import Clip
from ..pipeline import default_device
from ..plugins import is_function, load_function
from .models import load_model

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
COLOR_CLIP = "openai/clip-vit-large-patch14"
# The colours of the benchmark's prompts.
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

Detector = Callable[[list[Image.Image]], Sequence[Sequence[Sequence[Any]]]]
ColorClassifier = Callable[[list[Image.Image], list[str]], Sequence[str]]

# Colour of everything outside an object's mask, in a crop.
_GREY = "#999"
# Detections of an image, the number that mmdet keeps.
_MAX_DETECTIONS = 100
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
# GenEval's names of COCO's classes, where they differ from COCO's own.
_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}


class Detection(NamedTuple):
    """An object detected in an image.

    Attributes:
        class_name: as the lines write it.
        score: confidence in [0, 1].
        box: x0, y0, x1, y1 in pixels.
        mask: (height, width) bool of the image's size, or None.
    """

    class_name: str
    score: float
    box: Sequence[float]
    mask: np.ndarray | None = None


def load_detector(name: str, classes: Collection[str]) -> Detector:
    """Return a function that detects the objects in images.

    Args:
        name: folder or Hub id of a Mask2Former, or MODULE:FUNCTION, see `GenEval`.
        classes: those that the prompts name; a model must know them.

    Raises:
        OSError, ValueError: there is no such model or function, or it lacks classes.
    """
    if is_function(name):
        return _checked(load_function(name, "detector"), name)
    detector = Mask2FormerDetector(name)
    missing = sorted(set(classes) - set(detector.classes))
    if missing:
        raise ValueError(
            f"The detector {name} does not know {len(missing)} of the classes that the prompts name, first "
            f"{missing[0]!r}; GenEval needs COCO's 80, as {DETECTOR} has them."
        )
    return detector


def load_color_classifier(name: str) -> ColorClassifier:
    """Return a function that names the colours of crops, given the names of their classes too.

    Args:
        name: folder or Hub id of a CLIP, or MODULE:FUNCTION, see `GenEval`.

    Raises:
        OSError, ValueError: there is no such model or function.
    """
    if not is_function(name):
        return ClipColors(name)
    function = load_function(name, "colour classifier")

    def classify(crops: list[Image.Image], class_names: list[str]) -> list[str]:
        colors = list(function(crops)) if crops else []
        if len(colors) != len(crops) or not all(isinstance(color, str) for color in colors):
            raise ValueError(f"The colour classifier {name!r} must return {len(crops)} names, one a crop.")
        return colors

    return classify


class Mask2FormerDetector:
    """Instances detected by a Mask2Former of transformers, scored and masked at the image's own size.

    transformers' own post-processing cuts masks to 384×384 first. A detection's score is its class's probability times
    the mean probability of its mask, and a query may stand for several classes, as in mmdet.

    Args:
        path: folder or Hub id of an instance segmentation model.

    Raises:
        OSError: there is no such model.
    """

    def __init__(self, path: str = DETECTOR) -> None:
        self.model = load_model(Mask2FormerForUniversalSegmentation, path, "the detector", "--detector")
        self.processor = load_model(Mask2FormerImageProcessor, path, "the detector", "--detector")
        self.model = self.model.eval().to(default_device())
        labels = self.model.config.id2label
        self.classes = [_NAMES.get(labels[index], labels[index]) for index in range(len(labels))]

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> list[list[Detection]]:
        """Return the detections of each image.

        Images are processed one at a time: the processor would pad images of different sizes, and the masks would
        cover the padding.
        """
        return [self._detect(image) for image in images]

    def _detect(self, image: Image.Image) -> list[Detection]:
        pixels = self.processor(images=image, return_tensors="pt").pixel_values.to(self.model.device)
        found = self.model(pixel_values=pixels)
        probabilities = found.class_queries_logits[0].softmax(-1)[:, :-1]  # The last class stands for no object.
        scores, places = probabilities.flatten().topk(min(_MAX_DETECTIONS, probabilities.numel()))
        queries, labels = places // probabilities.shape[1], places % probabilities.shape[1]
        size = image.size[::-1]
        detections = []
        for score, query, label in zip(scores.tolist(), queries.tolist(), labels.tolist(), strict=True):
            logits = F.interpolate(found.masks_queries_logits[:, query : query + 1], size, mode="bilinear")[0, 0]
            if (mask := logits > 0).any():
                detections.append(_detection(self.classes[label], score * _certainty(logits, mask), mask))
        return detections


class ClipColors:
    """Colours classified by CLIP without training: the name nearest to an object's crop, in three sentences each.

    Args:
        path: folder or Hub id of a CLIP; the benchmark uses ViT-L/14.

    Raises:
        OSError, ValueError: there is no such model.
    """

    def __init__(self, path: str = COLOR_CLIP) -> None:
        self.clip = load_model(Clip, path, "the CLIP that tells colours", "--color-classifier")
        self._names = cache(self._sentences)

    def __call__(self, crops: list[Image.Image], class_names: list[str]) -> list[str]:
        """Return the name of each crop's colour."""
        if not crops:
            return []
        features = F.normalize(torch.from_numpy(self.clip.image_features([np.asarray(crop) for crop in crops])))
        return [COLORS[int((self._names(name) @ x).argmax())] for name, x in zip(class_names, features, strict=True)]

    def _sentences(self, name: str) -> Tensor:
        """Return (colours, d): of each colour the direction of its sentences' mean."""
        sentences = [template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES]
        features = F.normalize(torch.from_numpy(self.clip.text_features(sentences)))
        return F.normalize(features.reshape(len(COLORS), len(_TEMPLATES), -1).mean(1))


def crop(image: Image.Image, detection: Sequence[Any]) -> Image.Image:
    """Return the detection's box of the image, with everything outside its mask in grey."""
    _, _, box, mask = detection
    if mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, _GREY), Image.fromarray(np.asarray(mask, bool)))
    left, top, right, bottom = map(round, box)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def _checked(function: Detector, name: str) -> Detector:
    """Wrap a user's detector such that its detections are checked."""

    def detect(images: list[Image.Image]) -> list[list[Detection]]:
        found = list(function(images))
        if len(found) != len(images):
            raise ValueError(f"The detector {name!r} must return {len(images)} lists, one an image.")
        return [
            [_valid(detection, image, name) for detection in part] for part, image in zip(found, images, strict=True)
        ]

    return detect


def _valid(detection: Sequence[Any], image: Image.Image, name: str) -> Detection:
    wrong = f"The detector {name!r} found {detection!r}, but"
    if len(detection) != 4 or len(detection[2]) != 4:
        raise ValueError(f"{wrong} a detection is (class name, score, (x0, y0, x1, y1), mask or None).")
    left, top, right, bottom = detection[2]
    if not (left < right and top < bottom):
        raise ValueError(f"{wrong} a box is x0, y0, x1, y1 with x0 < x1 and y0 < y1.")
    if detection[3] is not None and np.shape(detection[3]) != image.size[::-1]:
        raise ValueError(f"{wrong} a mask has the image's (height, width), {image.size[::-1]}.")
    return Detection(*detection)


def _certainty(logits: Tensor, mask: Tensor) -> float:
    return float(logits.sigmoid()[mask].mean())


def _detection(name: str, score: float, mask: Tensor) -> Detection:
    rows, columns = mask.any(1).nonzero()[:, 0].tolist(), mask.any(0).nonzero()[:, 0].tolist()
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return Detection(name, score, box, mask.cpu().numpy())
