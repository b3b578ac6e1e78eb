"""Decoding of image files to RGB of eight bits: orientation, transparency, greys of 16 bits and floats."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


class UnreadableImage(Exception):
    """An image cannot be decoded."""


# Exceptions that Pillow raises for damaged or hostile files.
_DAMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def decode(file: bytes | str | Path) -> Image.Image:
    """Decode an image file, or the bytes of one.

    Raises:
        UnreadableImage: the image cannot be decoded.
    """
    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        try:
            image.load()
        except BaseException:
            image.close()
            raise
    except _DAMAGE as error:
        raise UnreadableImage(str(error)) from error
    return image


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, upright, with transparent parts on white.

    Greys of 16 bits and of floats from 0 to 1 (or to 255) are scaled, where Pillow's own conversion would clip them.
    Damaged EXIF data are ignored.

    Raises:
        UnreadableImage: the image cannot be converted, or the range of its values is not known.
    """
    with suppress(Exception):  # Pillow raises exceptions of many kinds for damaged EXIF data.
        image = ImageOps.exif_transpose(image)
    try:
        if image.mode.startswith("I") or image.mode == "F":
            return _scaled(image).convert("RGB")
        if image.has_transparency_data:
            opaque = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
        return image.convert("RGB")
    except _DAMAGE as error:
        raise UnreadableImage(str(error)) from error


def _scaled(image: Image.Image) -> Image.Image:
    """Convert an image of one channel of 16 or 32 bits to eight bits."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
        raise UnreadableImage(f"its values of mode {image.mode} are not in a known range")
    return Image.fromarray((values * (255 / _range(image.mode, values))).round().astype(np.uint8))


def _range(mode: str, values: Any) -> int:
    """Return the value of white: that of the mode, or the smallest usual one that no value exceeds."""
    if mode.startswith("I;16"):
        return 65535
    usual = (1, 255, 65535) if mode == "F" else (255, 65535)
    return next(white for white in usual if values.max() <= white)
