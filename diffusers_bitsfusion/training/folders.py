"""Folders of captioned images, checked when they are opened, so that errors are reported before a run begins."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..utils.json_files import read_json
from .image_files import decode

# Number of samples at the start of a WebDataset whose fields `datasets` requires to be the same.
_SHARED_FIELDS = 5
# Names of the files that the imagefolder of `datasets` reads captions from.
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Bytes of the largest file of captions that is read; those of a million images take some 50 MB.
_MAX_CAPTIONS = 64 << 20


class ArrayImages:
    """Folder with `images.npy`, uint8 [n, height, width, 3], and `captions.json`, {"captions": [n texts]}.

    Args:
        folder: the folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the images have another dtype or shape, or the captions another number.
    """

    def __init__(self, folder: Path) -> None:
        self.images = _load_array(folder / "images.npy")
        self.captions = _load_captions(folder / "captions.json")
        if len(self.images) != len(self.captions):
            raise ValueError(
                f"{folder} holds {len(self.images)} images, but {len(self.captions)} captions: one is needed for each."
            )

    def __len__(self) -> int:
        return len(self.captions)

    def read(self, index: int) -> tuple[Image.Image, str | Sequence[str]]:
        """Return the image and its caption or captions."""
        return Image.fromarray(self.images[index]), self.captions[index]


def _load_array(file: Path) -> np.ndarray:
    try:
        images: np.ndarray = np.load(file, mmap_mode="r")
    except ValueError as error:
        raise ValueError(f"{file} is not an array: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"{file} should hold uint8 [n, height, width, 3], it holds {images.dtype} {list(images.shape)}."
        )
    return images


def _load_captions(file: Path) -> list[Any]:
    content = read_json(file, max_bytes=_MAX_CAPTIONS)
    captions = content.get("captions")
    if not isinstance(captions, list):
        raise ValueError(f'{file} should hold an object {{"captions": [...]}} with a text for each image.')
    for index, caption in enumerate(captions):
        texts = caption if isinstance(caption, list) else [caption]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{file}: caption {index} should be a text or a list of texts, got {caption!r}.")
    return captions


class CaptionFileImages:
    """Folder of images, each with its caption in a .txt file of the same name beside it.

    Args:
        folder: folder that holds the images, itself or in subfolders.
        files: paths of the images.

    Raises:
        ValueError: an image has no such file, or its file is not UTF-8.
    """

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.files = list(files)
        missing = [file for file in self.files if not file.with_suffix(".txt").is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of the {len(self.files)} images in {folder} have no .txt file with their caption "
                f"beside them, {missing[0].relative_to(folder)} for example."
            )
        self.captions = [_read_caption(file.with_suffix(".txt")) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image.Image, str]:
        """Return the image and its caption.

        Raises:
            UnreadableImage: the image cannot be decoded.
        """
        return decode(self.files[index]), self.captions[index]


def _read_caption(file: Path) -> str:
    try:
        return " ".join(file.read_text(encoding="utf-8").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted."""
    endings = Image.registered_extensions()
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in endings)


def has_metadata(folder: Path) -> bool:
    """Return whether a folder has captions where the imagefolder of `datasets` reads them."""
    return any(next(folder.rglob(name), None) is not None for name in _METADATA)


def explain_missing_captions(folder: Path) -> str:
    """Return an error message that says how to add captions to a folder of images without readable ones."""
    if not image_files(folder):
        return f"{folder} holds no images."
    obstacle = "Its subfolders name classes, which are no captions. " if _has_classes(folder) else ""
    if tables := sorted(file.name for file in folder.glob("*.csv")):
        obstacle = f"{tables[0]} is not read. "
    return (
        f"{folder} has images, but no captions: write metadata.jsonl into it, with a line "
        '{"file_name": "0.png", "text": "a red circle"} for each image, or a .txt file beside each. '
        f"{obstacle}"
    ).rstrip()


def _has_classes(folder: Path) -> bool:
    return bool(image_files(folder)) and not any(file.parent == folder for file in image_files(folder))


def check_shards(shards: Sequence[str], image_fields: Sequence[str], caption_fields: Sequence[str]) -> None:
    """Refuse WebDataset shards in which a sample lacks its image or caption, by the names of their files alone.

    Args:
        shards: paths of the shards, in their order.
        image_fields: possible extensions of the image, of which the first sample decides on one.
        caption_fields: possible extensions of the caption, of which the first sample decides on one.

    Raises:
        ValueError: a shard is damaged or empty, or a sample has other fields than the first; the message names both.
    """
    first: tuple[str, ...] = ()
    for shard in shards:
        count = 0
        for key, fields in _samples(shard):
            first = first or fields
            needed = [
                next((field for field in usual if field in first), None) for usual in (image_fields, caption_fields)
            ]
            missing = [field for field in needed if field is not None and field not in fields]
            count += 1
            if missing or (shard == shards[0] and count <= _SHARED_FIELDS and set(fields) != set(first)):
                raise ValueError(
                    f"{shard}: sample {key} has the files {', '.join(fields)}, the first sample {', '.join(first)}. "
                    "All samples need an image and a caption of the same kinds."
                )
        if not count:
            raise ValueError(f"{shard} holds no samples.")


def _samples(shard: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (key, extensions) of each sample of a shard: consecutive files whose names agree up to the first dot."""
    current: tuple[str, list[str]] | None = None
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, field = name.partition(".")
                if not member.isfile() or not key or not field:
                    continue
                key = f"{folder}/{key}".lstrip("/")
                if current is not None and current[0] == key:
                    current[1].append(field.lower())
                    continue
                if current is not None:
                    yield current[0], tuple(current[1])
                current = key, [field.lower()]
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{shard} is damaged, or no tar file: {error}") from error
    if current is not None:
        yield current[0], tuple(current[1])
