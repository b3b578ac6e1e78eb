"""Image files as they come: orientation, damage, transparency, greys of more than eight bits."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from diffusers_bitsfusion.training.image_files import UnreadableImage, as_rgb, decode

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
RED = Image.new("RGB", (6, 4), "red")


def stored(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(content: bytes) -> np.ndarray:
    return np.asarray(as_rgb(decode(content))).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"garbage", b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b""])
def test_damaged_exif_is_taken_as_none(kind, exif):
    if kind == "TIFF":
        content = stored(RED, kind)[:-6]  # its last directory entries
    else:
        content = stored(RED, kind, exif=exif)
    try:
        image = decode(content)
    except UnreadableImage:
        return  # skipped, which is right as well
    pixels = np.asarray(as_rgb(image)).astype(int)
    assert abs(pixels - np.asarray(RED)).max() <= 6


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    assert as_rgb(decode(stored(RED, exif=exif.tobytes()))).size == (4, 6)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.fromarray((RAMP * 65535).round().astype(np.uint16)), "PNG"),
        (Image.fromarray((RAMP * 65535).round().astype(np.uint16)), "TIFF"),
        (Image.fromarray((RAMP * 65535).round().astype(np.int32)), "TIFF"),
        (Image.fromarray((RAMP * 255).round().astype(np.int32)), "TIFF"),
        (Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        (Image.fromarray((RAMP * 255).astype(np.float32)), "TIFF"),
    ],
)
def test_deep_greys_keep_their_values(image, kind):
    pixels = read(stored(image, kind))
    assert abs(pixels - np.round(RAMP * 255)[..., None]).max() <= 1


@pytest.mark.parametrize("values", [-RAMP, RAMP * np.nan, RAMP * 1e9])
def test_floats_of_no_known_range_are_not_guessed_at(values):
    with pytest.raises(UnreadableImage, match="not in a known range"):
        as_rgb(Image.fromarray(values.astype(np.float32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_parts_are_white(mode):
    image = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    image.paste((10, 10, 10, 255), (0, 0, 3, 4))
    if mode == "P":
        image = image.quantize(4)
    else:
        image = image.convert(mode)
    content = stored(image, "TIFF" if mode == "PA" else "PNG") if mode != "PA" else None
    pixels = read(content) if content else np.asarray(as_rgb(image)).astype(int)
    assert (pixels[:, 3:] == 255).all() and (pixels[:, :3] <= 12).all()


def test_other_modes_are_converted():
    for mode in ("1", "L", "CMYK", "YCbCr", "HSV"):
        assert as_rgb(Image.new("RGB", (2, 2), "white").convert(mode)).getpixel((0, 0)) == (255, 255, 255)


def test_what_is_no_image_is_unreadable(tmp_path):
    for content in (b"", b"no image", stored(RED)[:40]):
        with pytest.raises(UnreadableImage):
            decode(content)
    with pytest.raises(UnreadableImage, match=r"none.png"):
        decode(tmp_path / "none.png")
