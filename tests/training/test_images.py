import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_bitsfusion.training.images import ArrayImages, DatasetImages, TrainingImages, open_images

CAPTIONS = [f"caption {i}" for i in range(5)]
datasets.disable_progress_bars()


def pictures(n=5, size=(12, 10)):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for _ in range(n)]


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_arrays(folder):
    np.save(folder / "images.npy", np.stack([np.asarray(image) for image in pictures()]))
    (folder / "captions.json").write_text(json.dumps({"captions": CAPTIONS, "foils": []}))


def write_image_folder(folder):
    for i, image in enumerate(pictures()):
        image.save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": caption}) for i, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def write_shards(folder):
    for shard, part in enumerate((range(3), range(3, 5))):
        with tarfile.open(folder / f"data-{shard}.tar", "w") as tar:
            for i in part:
                for end, content in (("png", png(pictures()[i])), ("txt", CAPTIONS[i].encode())):
                    info = tarfile.TarInfo(f"{i:04}.{end}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("write", [write_arrays, write_image_folder, write_shards])
def test_folders(write, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder)
    source = open_images(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    read = [source.read(i) for i in range(len(source))]
    assert [caption for _, caption in read] == CAPTIONS
    for (image, _), expected in zip(read, pictures(), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(expected))


def a_dataset(**changes):
    stored = [{"bytes": png(image), "path": None} for image in pictures()]
    return datasets.Dataset.from_dict({"image": stored, "text": CAPTIONS} | changes)


def test_a_dataset_saved_to_disk(tmp_path):
    a_dataset().save_to_disk(tmp_path / "saved")
    source = open_images(str(tmp_path / "saved"))
    assert np.array_equal(np.asarray(source.read(2)[0]), np.asarray(pictures()[2]))
    assert source.read(2)[1] == CAPTIONS[2]


def test_columns_by_name_and_a_missing_one():
    renamed = a_dataset().rename_columns({"image": "picture", "text": "words"})
    assert DatasetImages(renamed, "picture", "words").read(0)[1] == CAPTIONS[0]
    with pytest.raises(ValueError, match=r"--caption_column value 'text' needs to be one of: picture, words"):
        DatasetImages(renamed, "picture")
    with pytest.raises(ValueError, match=r"--image_column value 'img' needs to be one of: picture, words"):
        DatasetImages(renamed, "img", "words")


def test_a_folder_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        open_images(train_data_dir="nowhere")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_images_that_do_not_decode_are_skipped_and_named():
    stored = [{"bytes": png(image), "path": None} for image in pictures()]
    stored[1]["bytes"] = b"not a picture"
    stored[2]["bytes"] = stored[2]["bytes"][:60]
    images = TrainingImages(DatasetImages(a_dataset(image=stored)), 8)
    sample = images.load(1, generator())
    assert sample["skipped"] == [1, 2] and sample["caption"] == CAPTIONS[3]
    assert images.load(0, generator())["skipped"] == []
    absent = TrainingImages(DatasetImages(a_dataset(image=[None, *stored[1:]])), 8)
    assert absent.load(0, generator())["skipped"] == [0, 1, 2]
    broken = [{"bytes": b"no", "path": None}] * 5
    with pytest.raises(ValueError, match="None of the 5 images of the training set decodes"):
        TrainingImages(DatasetImages(a_dataset(image=broken)), 8).load(3, generator())


def test_pixels_are_cut_scaled_and_mirrored(tmp_path):
    write_arrays(tmp_path)
    square = np.asarray(pictures()[0])[1:11]  # the middle of 12 x 10
    exact = TrainingImages(ArrayImages(tmp_path), 10, center_crop=True)
    pixels = exact.load(0, generator())["pixels"]
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), square / 127.5 - 1, atol=1e-6)
    flipping = TrainingImages(ArrayImages(tmp_path), 10, center_crop=True, random_flip=True)
    seen = [flipping.load(0, generator(seed))["pixels"] for seed in range(40)]
    mirrored = [torch.equal(each, pixels.flip(-1)) for each in seen]
    assert 8 < sum(mirrored) < 32
    assert all(m or torch.equal(each, pixels) for m, each in zip(mirrored, seen, strict=True))
    crops = {
        TrainingImages(ArrayImages(tmp_path), 10).load(0, generator(s))["pixels"].numpy().tobytes() for s in range(9)
    }
    assert len(crops) > 1


def test_one_of_several_captions_is_sampled():
    source = DatasetImages(a_dataset(text=[["x", "y"]] * 4 + [None]))
    images = TrainingImages(source, 8)
    assert {images.load(0, generator(seed))["caption"] for seed in range(20)} == {"x", "y"}
    assert images.load(4, generator())["caption"] == ""
    numbers = TrainingImages(DatasetImages(a_dataset(text=[[1]] * 5)), 8)
    with pytest.raises(ValueError, match="caption of sample 0 should be a string"):
        numbers.load(0, generator())


def test_max_samples_and_none_at_all(tmp_path):
    write_arrays(tmp_path)
    assert len(TrainingImages(ArrayImages(tmp_path), 8, max_samples=2)) == 2
    with pytest.raises(ValueError, match="holds no images"):
        TrainingImages(ArrayImages(tmp_path), 8, max_samples=0)
