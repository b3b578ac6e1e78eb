"""The loops compiled for ARM's processors by a cross compiler, and decoding run by an emulator where there is one.

apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static
"""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
import torch

from diffusers_bitsfusion.codec.grid import half_range
from diffusers_bitsfusion.codec.radix import pack_dense
from diffusers_bitsfusion.native.compiler import COMMON_FLAGS, SOURCES
from diffusers_bitsfusion.ops.decode import decode_reference

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64-static")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a cross compiler for ARM")

ROWS, COLUMNS = 3, 1000
# Decodes what stands on its input and writes the weights in fp32, in bf16 and as codes.
PROGRAM = """
#include "decode.h"
#include <stdio.h>
#include <stdlib.h>
int main(void) {
    int64_t head[4]; /* bits, rows, columns, bytes of a row */
    if (fread(head, 8, 4, stdin) != 4) return 1;
    uint8_t *dense = malloc(head[1] * head[3]);
    float *scale = malloc(4 * head[1]);
    if (fread(dense, 1, head[1] * head[3], stdin) != (size_t)(head[1] * head[3])) return 2;
    if (fread(scale, 4, head[1], stdin) != (size_t)head[1]) return 3;
    const int sizes[3] = {4, 2, 1}, kinds[3] = {FLOAT32, BFLOAT16, INT8};
    for (int k = 0; k < 3; k++) {
        void *out = malloc(head[1] * head[2] * sizes[k]);
        DecodeArguments a = {dense, scale, out, head[2], head[3], head[0], kinds[k]};
        bitsfusion_decode(&a, 0, head[1]);
        fwrite(out, sizes[k], head[1] * head[2], stdout);
    }
    return 0;
}
"""


def decoded(program, bits):
    half = half_range(bits)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-half, half + 1, (ROWS, COLUMNS), generator=generator, dtype=torch.int8)
    dense, scale = pack_dense(codes, bits), torch.rand(ROWS, generator=generator)
    head = np.array([bits, ROWS, COLUMNS, dense.shape[1]], np.int64)
    given = head.tobytes() + dense.numpy().tobytes() + scale.numpy().tobytes()
    written = subprocess.run([EMULATOR, program], input=given, capture_output=True, check=True).stdout
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        expected = decode_reference(dense, scale, bits, COLUMNS, torch.empty(ROWS, COLUMNS, dtype=dtype))
        found = torch.frombuffer(bytearray(written[: expected.nbytes]), dtype=dtype).view(ROWS, COLUMNS)
        written = written[expected.nbytes :]
        yield torch.equal(found, expected)


@pytest.mark.parametrize("march", ["armv8-a", "armv8.2-a+dotprod", "armv8.6-a+bf16"])
def test_every_loop_compiles_for_arm_and_decodes_there_as_the_reference(march, tmp_path):
    main, program = tmp_path / "main.c", tmp_path / "decode"
    main.write_text(PROGRAM)
    runs = EMULATOR is not None and march == "armv8-a"
    # What only has to compile is not optimised in full, which takes four times as long.
    flags = [*(flag for flag in COMMON_FLAGS if flag != "-shared"), *(() if runs else ("-O1",))]
    sources = [str(file) for file in SOURCES if file.suffix == ".c"]
    include = f"-I{SOURCES[0].parent}"
    command = [COMPILER, *flags, f"-march={march}", "-Wall", "-Werror", "-static", include, str(main), *sources]
    subprocess.run([*command, "-lm", "-o", str(program)], check=True)
    if runs:
        assert all(equal for bits in range(1, 9) for equal in decoded(program, bits))
