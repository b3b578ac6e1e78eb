"""Rows of docs/classes.md against what a run gives."""

from __future__ import annotations

import diffusers
import pytest

from .catalog import classes
from .table import PAGE, row, rows

pytestmark = pytest.mark.usefixtures("one_thread")

# A family each: a UNet of one dimension, a transformer of images, one of video, an autoencoder of video.
SAMPLE = ("UNet1DModel", "FluxTransformer2DModel", "WanTransformer3DModel", "AutoencoderKLWan")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_is_what_a_run_gives(name):
    assert row(name) == rows()[name]


def test_every_class_of_the_installed_version_has_a_row():
    if f"diffusers {diffusers.__version__} " not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("the page is of another version of diffusers")
    assert list(rows()) == classes()
