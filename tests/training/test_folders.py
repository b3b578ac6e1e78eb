"""Folders of captioned images as they come: read, or refused when opened, with what is missing and where."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_bitsfusion.training.images import DatasetImages, TrainingImages, open_images

datasets.disable_progress_bars()
CAPTIONS = ["a red circle", "a blue square", "a star"]


def png(color: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures without captions."""
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.png").write_bytes(png(index))
    return folder


def opened(folder: Path, **options):
    return open_images(train_data_dir=str(folder), cache_dir=str(folder.parent / "cache"), **options)


def test_captions_in_text_files_beside_the_pictures(folder):
    for index, caption in enumerate(CAPTIONS):
        (folder / f"{index}.txt").write_text(f"{caption}\n")
    source = opened(folder)
    assert [source.read(index)[1] for index in range(3)] == CAPTIONS
    assert source.read(2)[0].getpixel((0, 0)) == (2, 0, 0)
    (folder / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of the 3 images .* no \.txt file .* 1\.png"):
        opened(folder)


def test_folders_without_captions_say_what_is_needed(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no captions: write metadata\.jsonl") as error:
        opened(folder)
    assert "classes" not in str(error.value)
    (folder / "captions.csv").write_text("file,text\n0.png,a\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl .* captions\.csv is not read"):
        opened(folder)
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    (tmp_path / "classes" / "cat" / "0.png").write_bytes(png())
    with pytest.raises(ValueError, match=r"subfolders name classes, which are no captions"):
        opened(tmp_path / "classes", caption_column="label")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        opened(tmp_path / "empty")


def test_names_in_metadata_that_are_not_there_are_the_reason(folder):
    lines = [json.dumps({"file_name": f"gone-{index}.png", "text": "a"}) for index in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    images = TrainingImages(opened(folder), 8)
    with pytest.raises(ValueError, match=r"None of the 2 images .*No such file.*gone-0\.png"):
        images.load(0, torch.Generator())


CAPTION_COLUMNS = {
    "numbers": ([1, 2, 3], None),
    "lists of numbers": ([[1], [2], [3]], None),
    "objects": ([{"en": "x"}] * 3, None),
    "classes": ([0, 1, 0], datasets.ClassLabel(names=["cat", "dog"])),
}


@pytest.mark.parametrize("name", CAPTION_COLUMNS)
def test_a_column_that_holds_no_texts_is_refused_when_opened(name, tmp_path):
    values, feature = CAPTION_COLUMNS[name]
    dataset = datasets.Dataset.from_dict({"image": [{"bytes": png(), "path": None}] * 3, "text": values})
    if feature is not None:
        dataset = dataset.cast_column("text", feature)
    dataset.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="--caption_column 'text' should hold texts"):
        open_images(str(tmp_path / "saved"))


@pytest.mark.parametrize("caption", [0, 5, {"en": "x"}, [None, 3], 1.5, True])
def test_a_caption_that_is_no_text_is_named_by_its_sample(caption):
    class Source(DatasetImages):
        def __init__(self):
            pass

        def __len__(self):
            return 1

        def read(self, index):
            return Image.new("RGB", (4, 4)), [caption, caption] if isinstance(caption, str) else caption

    images = TrainingImages(Source(), 4)
    with pytest.raises(ValueError, match="The caption of sample 0 should be a string or a list of strings"):
        for seed in range(20):
            images.load(0, torch.Generator().manual_seed(seed))


def write_shard(file: Path, samples: dict[str, tuple[str, ...]]) -> None:
    with tarfile.open(file, "w") as tar:
        for key, fields in samples.items():
            for field in fields:
                content = b"a caption" if field == "txt" else png()
                info = tarfile.TarInfo(f"{key}.{field}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


GOOD = {f"{index:04}": ("png", "txt") for index in range(8)}
SHARDS = {
    "a caption is missing": (GOOD | {"0003": ("png",)}, "sample 0003 has the files png, the first sample png, txt"),
    "a late caption is missing": (GOOD | {"0007": ("png",)}, "sample 0007 has the files png"),
    "a picture of another kind": (GOOD | {"0002": ("jpg", "txt")}, "sample 0002 has the files jpg, txt"),
    "another file": (GOOD | {"0001": ("png", "txt", "json")}, "sample 0001 has the files png, txt, json"),
    "no samples": ({}, "holds no samples"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards_name_the_sample_that_does_not_fit(name, tmp_path):
    samples, message = SHARDS[name]
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "0.tar", samples)
    with pytest.raises(ValueError, match=rf"0\.tar:? .*{message}" if samples else message):
        opened(tmp_path / "data")


def test_a_damaged_shard_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match=r"0\.tar is damaged, or no tar file"):
        opened(tmp_path / "data")


def test_good_shards_of_many_samples_are_read(tmp_path):
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "0.tar", GOOD)
    write_shard(tmp_path / "data" / "1.tar", {f"a/{key}": fields for key, fields in GOOD.items()})
    source = opened(tmp_path / "data")
    assert len(source) == 16 and source.read(15)[1] == "a caption"


ARRAYS = {
    "floats": (np.zeros((3, 4, 4, 3), np.float32), CAPTIONS, "it holds float32"),
    "greys": (np.zeros((3, 4, 4), np.uint8), CAPTIONS, r"it holds uint8 \[3, 4, 4\]"),
    "channels first": (np.zeros((3, 3, 4, 4), np.uint8), CAPTIONS, "should hold uint8"),
    "more captions": (np.zeros((2, 4, 4, 3), np.uint8), CAPTIONS, "2 images, but 3 captions"),
    "fewer captions": (np.zeros((4, 4, 4, 3), np.uint8), CAPTIONS, "4 images, but 3 captions"),
    "numbers": (np.zeros((3, 4, 4, 3), np.uint8), ["a", 1, "b"], "caption 1 should be a text"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_checked_when_opened(name, tmp_path):
    images, captions, message = ARRAYS[name]
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "captions.json").write_text(json.dumps({"captions": captions}))
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"texts": []}', "no JSON", '{"captions": "a"}'])
def test_captions_of_arrays_are_named_when_damaged(content, tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((1, 4, 4, 3), np.uint8))
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(ValueError, match=r"captions\.json"):
        opened(tmp_path)
