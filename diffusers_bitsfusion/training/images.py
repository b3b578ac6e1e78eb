"""Captioned images: Hub or local `datasets`, and the folders of `folders.py`; cut to size, with one caption each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .decoding import UnreadableImage, as_rgb, decode
from .folders import (
    ArrayImages,
    CaptionFileImages,
    check_shards,
    explain_missing_captions,
    has_metadata,
    image_files,
)

_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
_CAPTION_COLUMNS = ("text", "caption", "txt", "prompt")


class CaptionedImages(Protocol):
    """Images and captions by index."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, str | Sequence[str]]:
        """The image and its caption or captions.

        Raises:
            UnreadableImage: it does not decode.
        """


class DatasetImages:
    """A `datasets.Dataset` with an image and a caption column.

    Args:
        dataset: a map-style dataset.
        image_column: its name; found by itself where it is a usual one.
        caption_column: likewise; texts or lists of texts, one of which is drawn each time.

    Raises:
        ValueError: there is no such column; the message lists those that there are.
    """

    def __init__(self, dataset: Any, image_column: str | None = None, caption_column: str | None = None):
        import datasets

        self.image_column = _column("image_column", image_column, _IMAGE_COLUMNS, dataset.column_names)
        self.caption_column = _column("caption_column", caption_column, _CAPTION_COLUMNS, dataset.column_names)
        dataset = dataset.select_columns([self.image_column, self.caption_column])
        # Decoded here, so that one broken file does not end the run.
        self.dataset = dataset.cast_column(self.image_column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, str | Sequence[str]]:
        row = self.dataset[index]
        stored, caption = row[self.image_column], row[self.caption_column]
        if stored is None:
            raise UnreadableImage("there is none")
        return decode(stored["path"] if stored["bytes"] is None else stored["bytes"]), caption


def _column(argument: str, name: str | None, usual: Sequence[str], columns: Sequence[str]) -> str:
    if name is None:
        name = next((column for column in usual if column in columns), usual[0])
    if name not in columns:
        raise ValueError(f"--{argument} value '{name}' needs to be one of: {', '.join(columns)}")
    return name


def _check_captions(source: DatasetImages) -> DatasetImages:
    """Refuse a caption column that holds no texts, by its declared type, before a run meets the first of them.

    Raises:
        ValueError: it holds class numbers, numbers or objects.
    """
    import datasets

    feature = source.dataset.features[source.caption_column]
    kind = getattr(feature, "feature", feature)
    if isinstance(kind, datasets.ClassLabel):
        holds = f"numbers of the classes {', '.join(kind.names[:5])}"
    elif getattr(kind, "dtype", None) in ("string", "large_string", "null"):
        return source
    else:
        holds = f"{feature}"
    raise ValueError(
        f"--caption_column '{source.caption_column}' should hold texts or lists of texts, it holds {holds}."
    )


def open_images(
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    *,
    dataset_config_name: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    cache_dir: str | None = None,
) -> CaptionedImages:
    """Open captioned images.

    Args:
        dataset_name: Hub id, or folder of a local dataset, one written by `save_to_disk` included.
        train_data_dir: instead, a folder of `images.npy` and `captions.json`; of WebDataset shards (*.tar); or of
            images with a `metadata.jsonl` (`datasets`' imagefolder), or with a .txt file beside each.
        dataset_config_name: configuration of the dataset.
        image_column: see `DatasetImages`.
        caption_column: see `DatasetImages`.
        cache_dir: where `datasets` keeps what it downloads and converts.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a column is missing or holds no texts, or images and captions do not fit; the message says which.
    """
    if dataset_name is None:
        return _open_folder(Path(str(train_data_dir)), image_column, caption_column, cache_dir)
    import datasets

    if (Path(dataset_name) / "state.json").is_file():
        dataset = datasets.load_from_disk(dataset_name)
    else:
        dataset = datasets.load_dataset(dataset_name, dataset_config_name, cache_dir=cache_dir, split="train")
    return _check_captions(DatasetImages(dataset, image_column, caption_column))


def _open_folder(
    folder: Path, image_column: str | None, caption_column: str | None, cache_dir: str | None
) -> CaptionedImages:
    if not folder.is_dir():
        raise FileNotFoundError(f"--train_data_dir {folder} is not a folder.")
    if (folder / "images.npy").is_file():
        return ArrayImages(folder)
    import datasets

    shards = sorted(str(file) for file in folder.glob("*.tar"))
    if shards:
        check_shards(
            shards,
            _IMAGE_COLUMNS if image_column is None else [image_column],
            _CAPTION_COLUMNS if caption_column is None else [caption_column],
        )
        dataset = datasets.load_dataset("webdataset", data_files=shards, cache_dir=cache_dir, split="train")
    elif has_metadata(folder):
        dataset = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=cache_dir, split="train")
    else:
        files = image_files(folder)
        if not any(file.with_suffix(".txt").is_file() for file in files):
            raise ValueError(explain_missing_captions(folder))
        return CaptionFileImages(folder, files)
    return _check_captions(DatasetImages(dataset, image_column, caption_column))


class TrainingImages:
    """Images cut to size, with one caption each.

    Args:
        source: where they come from.
        resolution: side of the square that the model is trained on.
        center_crop: whether to cut from the middle instead of anywhere.
        random_flip: whether to mirror half of the images.
        max_samples: use the first so many only.
    """

    def __init__(
        self,
        source: CaptionedImages,
        resolution: int,
        center_crop: bool = False,
        random_flip: bool = False,
        max_samples: int | None = None,
    ):
        self.source, self.resolution = source, resolution
        self.center_crop, self.random_flip = center_crop, random_flip
        self._count = len(source) if max_samples is None else min(max_samples, len(source))
        if not self._count:
            raise ValueError("The training set holds no images.")

    def __len__(self) -> int:
        return self._count

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """The image at `index`, or the next that decodes.

        Args:
            index: 0 to len - 1.
            generator: draws the crop, the flip and one of several captions.

        Returns:
            "pixels" fp32 [3, resolution, resolution] in [-1, 1], "caption", and "skipped", indices that did not
            decode.

        Raises:
            ValueError: no image decodes, or a caption is not text.
        """
        horizontal, vertical, flip, choice = torch.rand(4, generator=generator).tolist()
        skipped: list[int] = []
        reasons: list[str] = []
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            try:
                image, captions = self.source.read(candidate)
                image = as_rgb(image)
            except UnreadableImage as error:
                skipped.append(candidate)
                reasons.append(str(error))
                continue
            centering = (0.5, 0.5) if self.center_crop else (horizontal, vertical)
            pixels = self._pixels(image, centering, mirror=self.random_flip and flip < 0.5)
            return {"pixels": pixels, "caption": _one_caption(captions, choice, candidate), "skipped": skipped}
        raise ValueError(
            f"None of the {len(self)} images of the training set decodes. Number {skipped[0]}: {reasons[0]}"
        )

    def _pixels(self, image: Image.Image, centering: tuple[float, float], mirror: bool) -> Tensor:
        image = ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.BILINEAR, centering=centering)
        if mirror:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)


def _one_caption(captions: Any, choice: float, index: int) -> str:
    """One of a sample's captions; the empty text where it has none."""
    texts = captions if isinstance(captions, (list, tuple)) else [captions]
    chosen = texts[int(choice * len(texts))] if texts else None
    if chosen is None:
        return ""
    if not isinstance(chosen, str):
        raise ValueError(f"The caption of sample {index} should be a string or a list of strings, got {captions!r}.")
    return chosen
