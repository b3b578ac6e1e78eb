from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from train_runs import write_images


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Seven captioned images of 16 x 16 as arrays."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


@pytest.fixture(scope="session")
def parts(source_folder) -> StableDiffusionPipeline:
    """The tiny pipeline, whose parts no test changes."""
    pipeline = StableDiffusionPipeline.from_pretrained(source_folder)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    return pipeline
