"""The CRC-32 of zlib, computed by zlib-ng where there is a build of it: three times as many bytes a second."""

from __future__ import annotations

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:  # pyproject.toml asks for it only on the processors that it is built for.
    from zlib import crc32

__all__ = ["crc32"]
