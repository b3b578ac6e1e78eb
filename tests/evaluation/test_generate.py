from __future__ import annotations

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline

from diffusers_bitsfusion.evaluation import Sampling, generate_images, load_pipeline
from diffusers_bitsfusion.evaluation.image_folder import ImageFolder

CAPTIONS = ["a", "b", "ab", "b", "c"]
SAMPLING = Sampling(steps=2, batch_size=2)


@pytest.fixture(scope="module")
def pipeline(source_folder) -> DiffusionPipeline:
    return load_pipeline(source_folder)


def test_pictures_do_not_depend_on_the_batch_size(pipeline, one_thread):
    by_size = {
        size: generate_images(pipeline, CAPTIONS, Sampling(steps=2, batch_size=size), progress=False)
        for size in (1, 2, 5)
    }
    assert by_size[1].shape == (5, 16, 16, 3) and by_size[1].dtype == np.uint8
    for images in by_size.values():
        # One step of 255: batches of other sizes are summed in another order.
        assert np.abs(images.astype(int) - by_size[1]).max() <= 1
    assert np.abs(by_size[1][1].astype(int) - by_size[1][3]).max() > 5  # the same caption, another seed


def test_pictures_depend_on_the_seed(pipeline, one_thread):
    first, again, other = (
        generate_images(pipeline, CAPTIONS[:2], Sampling(steps=2, seed=seed), progress=False) for seed in (1, 1, 2)
    )
    assert (first == again).all()
    assert (first[1] != other[0]).any()  # neighbouring seeds share nothing


def test_an_interrupted_run_goes_on(pipeline, tmp_path, monkeypatch, one_thread):
    folder = ImageFolder(tmp_path / "images", {})
    whole = generate_images(pipeline, CAPTIONS, SAMPLING, progress=False)
    generate_images(pipeline, CAPTIONS[:3], SAMPLING, folder, progress=False)
    encoded = []
    monkeypatch.setattr(
        type(pipeline), "encode_prompt", _recording(type(pipeline).encode_prompt, encoded), raising=True
    )
    resumed = generate_images(pipeline, CAPTIONS, SAMPLING, folder, progress=False)
    assert encoded == [CAPTIONS[3:]]
    assert np.abs(resumed.astype(int) - whole).max() <= 1


def _recording(method, prompts: list):
    def recorded(self, prompt, *args, **kwargs):
        prompts.append(prompt)
        return method(self, prompt, *args, **kwargs)

    return recorded


def test_nan_is_an_error(pipeline, monkeypatch):
    monkeypatch.setattr(
        type(pipeline), "__call__", lambda self, prompt, **_: _Output(np.full((len(prompt), 4, 4, 3), np.nan))
    )
    with pytest.raises(ValueError, match="generated NaN"):
        generate_images(pipeline, CAPTIONS, SAMPLING, progress=False)


class _Output:
    def __init__(self, images: np.ndarray) -> None:
        self.images = images


def test_a_pipeline_without_prompts_is_refused(pipeline):
    unconditional = DDPMPipeline(pipeline.unet, DDPMScheduler())
    with pytest.raises(ValueError, match="DDPMPipeline takes no prompt"):
        generate_images(unconditional, CAPTIONS, SAMPLING)


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"batch_size": 0}, {"seed": -1}, {"guidance_scale": float("nan")}, {"steps": "x"}]
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=r"must be (at least|an integer from)"):
        Sampling(**changes)
