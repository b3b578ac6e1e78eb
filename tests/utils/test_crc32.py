import random
import zlib

import pytest

from diffusers_bitsfusion.utils.crc32 import crc32


@pytest.mark.parametrize("size", [0, 1, 63, 4096, 300_001])
def test_it_is_the_crc32_of_zlib_whatever_computes_it(size):
    data = random.Random(size).randbytes(size)
    for start in (0, 1, 0xDEADBEEF, 2**32 - 1):
        assert crc32(data, start) == zlib.crc32(data, start)
        assert crc32(memoryview(data)[size // 2 :], crc32(data[: size // 2], start)) == zlib.crc32(data, start)
