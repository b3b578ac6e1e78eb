import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

CAPTIONS = [f"a {letter}" for letter in "abcdefg"]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Seven captioned images of 16 x 16 as arrays."""
    folder = tmp_path_factory.mktemp("images")
    images = np.random.default_rng(0).integers(0, 255, (len(CAPTIONS), 16, 16, 3), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    (folder / "captions.json").write_text(json.dumps({"captions": CAPTIONS}))
    return folder


@pytest.fixture(scope="session")
def parts(source_folder) -> StableDiffusionPipeline:
    """The tiny pipeline, whose parts no test changes."""
    pipeline = StableDiffusionPipeline.from_pretrained(source_folder)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    return pipeline
