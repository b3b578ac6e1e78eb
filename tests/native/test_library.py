import ctypes
import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_bitsfusion.codec.grid import half_range
from diffusers_bitsfusion.codec.quantize_dense import quantize_to_dense
from diffusers_bitsfusion.codec.radix import dense_width, pack_dense, unpack_dense
from diffusers_bitsfusion.codec.repack import repack
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.codec.scales import quantize_rows
from diffusers_bitsfusion.native import library as native
from diffusers_bitsfusion.native.arguments import DecodeArguments
from diffusers_bitsfusion.native.compiler import compilers
from diffusers_bitsfusion.ops.decode import decode, decode_reference, decode_weight
from diffusers_bitsfusion.ops.products import block_codes, int_mm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

all_bits = pytest.mark.parametrize("bits", range(1, 9))


@pytest.fixture
def no_compiler(fresh_library, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)


@pytest.fixture
def quick_build(fresh_library, monkeypatch):
    """Builds a library that is slow to run: fully optimised, compiling it takes four times as long."""
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-O1"))


def random_packed(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    half = half_range(bits)
    codes = torch.randint(-half, half + 1, (rows, columns), generator=generator).to(torch.int8)
    scale = torch.randn(rows, generator=generator).exp() * 0.01
    return codes, pack_dense(codes, bits), scale


def squared_errors(weight, dense, scale, bits):
    codes = unpack_dense(dense, bits, weight.shape[1])
    return (codes.double() * scale.double()[:, None] - weight.double()).square().sum(1)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_this_machine_compiles_the_library():
    assert native.native_library() is not None


@all_bits
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 7, 64, 1001])
def test_compiled_decoding_equals_the_reference_bit_for_bit(bits, dtype, columns):
    _, dense, scale = random_packed(5, columns, bits, seed=columns)
    expected = decode_reference(dense, scale, bits, columns, torch.empty(5, columns, dtype=dtype))
    assert same_bits(decode(dense, scale, bits, columns, torch.empty(5, columns, dtype=dtype)), expected)


@pytest.mark.parametrize("instructions", ["avx512vbmi", "avx512f", "avx2"])
def test_processors_with_fewer_instructions_decode_the_same(instructions, fresh_library, monkeypatch):
    if platform.machine() != "x86_64":
        pytest.skip("the flag is one of x86 compilers")
    command = [*compilers()[0], "-march=native", "-dM", "-E", "-x", "c", os.devnull]
    if f"__{instructions.upper()}__" not in subprocess.run(command, capture_output=True, text=True, check=True).stdout:
        pytest.skip("this processor has none of them, so that the library is the one of the other tests")
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, f"-mno-{instructions}"))
    assert native.native_library() is not None
    for bits, dtype, columns in itertools.product((1, 2, 3, 4), (*DTYPES, torch.int8), (45, 161, 427, 1001)):
        _, dense, scale = random_packed(5, columns, bits, seed=columns)
        expected = decode_reference(dense, scale, bits, columns, torch.empty(5, columns, dtype=dtype))
        assert same_bits(decode(dense, scale, bits, columns, torch.empty(5, columns, dtype=dtype)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_nothing_is_written_beside_the_output(bits, dtype):
    for columns in (*range(1, 330), 427, 1001):
        _, dense, scale = random_packed(2, columns, bits, seed=columns)
        memory = torch.full((4, columns), 77, dtype=dtype)
        decode(dense, scale, bits, columns, memory[1:3])
        assert (memory[0] == 77).all() and (memory[3] == 77).all()


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_codes_of_every_length_are_decoded(bits):
    for columns in range(1, 1000):
        codes, dense, scale = random_packed(1, columns, bits, seed=columns)
        assert torch.equal(decode(dense, scale, bits, columns, torch.empty(1, columns, dtype=torch.int8)), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_rows_of_several_blocks_decode_like_short_ones(bits):
    columns = 5 * 4096 * 2 + 13
    codes, dense, scale = random_packed(2, columns, bits)
    decoded = decode(dense, scale, bits, columns, torch.empty(2, columns))
    assert torch.equal(decoded, codes * scale[:, None])


@given(bits=st.integers(1, 8), rows=st.integers(1, 9), columns=st.integers(1, 400), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=100)
def test_every_shape_decodes_to_scale_times_code(bits, rows, columns, seed):
    codes, dense, scale = random_packed(rows, columns, bits, seed)
    assert torch.equal(decode(dense, scale, bits, columns, torch.empty(rows, columns)), codes * scale[:, None])


def test_bf16_weights_are_rounded_to_the_nearest_even():
    scale = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20])
    dense = pack_dense(torch.ones(3, 1, dtype=torch.int8), 1)
    decoded = decode(dense, scale, 1, 1, torch.empty(3, 1, dtype=torch.bfloat16))
    assert decoded.flatten().tolist() == [1.0, 1 + 2.0**-6, 1 + 2.0**-7]


@all_bits
@pytest.mark.parametrize("balance", [True, False])
def test_compiled_quantizing_is_as_good_as_the_reference(bits, balance):
    torch.manual_seed(0)
    weight = torch.cat([torch.randn(4, 1501), torch.rand(4, 1501) - 0.5, torch.randn(4, 1501) ** 3])
    dense, scale = quantize_to_dense(weight, bits, Rounding(balance=balance))
    codes, reference_scale = quantize_rows(weight, bits, Rounding(balance=balance))
    found = squared_errors(weight, dense, scale, bits)
    expected = squared_errors(weight, pack_dense(codes, bits), reference_scale, bits)
    # Sums in another order can tip the choice of the start, and so the local optimum that is reached.
    assert (found <= expected * 1.02).all()


@all_bits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_read_exactly(bits, dtype):
    torch.manual_seed(1)
    weight = torch.randn(6, 333).to(dtype)
    weight[2] *= 2.0**-20  # subnormal in fp16
    weight[3] *= 2.0**10
    for found, wanted in zip(quantize_to_dense(weight, bits), quantize_to_dense(weight.float(), bits), strict=True):
        assert torch.equal(found, wanted)


def python_loop(function, parallel=True):
    """A loop that calls `function(arguments, start, stop)`; whoever keeps it keeps the callback alive."""
    callback = ctypes.CFUNCTYPE(None, ctypes.POINTER(DecodeArguments), ctypes.c_int64, ctypes.c_int64)(function)
    compiled = native.native_library().decode
    address = ctypes.cast(callback, ctypes.c_void_p).value
    return callback, native.Loop(address, compiled._run, compiled._parallel if parallel else None)


@pytest.fixture
def threads():
    """Sets how many threads torch computes with."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(count, threads):
    torch.manual_seed(2)
    weight = torch.randn(37, 1 << 14)
    expected = [quantize_to_dense(row.unsqueeze(0), 2) for row in weight]
    threads(count)
    dense, scale = quantize_to_dense(weight, 2)
    decoded = decode(dense, scale, 2, 1 << 14, torch.empty(37, 1 << 14))
    assert torch.equal(dense, torch.cat([d for d, _ in expected]))
    assert torch.equal(scale, torch.cat([s for _, s in expected]))
    assert torch.equal(decoded, unpack_dense(dense, 2, 1 << 14) * scale[:, None])


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 50])
def test_every_row_is_gone_over_once_with_the_arguments(rows, count, threads):
    threads(count)
    ranges = []
    _, loop = python_loop(lambda at, start, stop: ranges.append((start, stop, at[0].out, at[0].columns, at[0].bits)))
    loop(rows, 1 << 20, DecodeArguments(out=3, columns=1 << 40, bits=-4))
    assert sorted(row for start, stop, *_ in ranges for row in range(start, stop)) == list(range(rows))
    assert all(arguments == [3, 1 << 40, -4] for _, _, *arguments in ranges)


def test_ranges_run_at_the_same_time_where_that_is_worth_it(threads):
    threads(2)
    meeting = threading.Barrier(2)
    met = []
    _, loop = python_loop(lambda words, start, stop: met.append(meeting.wait(timeout=60)))
    loop(10, 1 << 20, DecodeArguments())
    assert sorted(met) == [0, 1]

    ranges = []
    _, loop = python_loop(lambda words, start, stop: ranges.append((start, stop)))
    loop(10, 1, DecodeArguments())
    assert ranges == [(0, 10)]


def test_without_threads_to_share_with_one_range_is_all():
    ranges = []
    _, loop = python_loop(lambda words, start, stop: ranges.append((start, stop)), parallel=False)
    loop(10, 1 << 20, DecodeArguments())
    assert ranges == [(0, 10)]


@pytest.mark.skipif(sys.platform != "linux", reason="the flag is one of GNU linkers")
def test_loops_without_memory_to_work_in_say_so(quick_build, monkeypatch, tmp_path):
    source = tmp_path / "no_memory.c"
    source.write_text("void *__wrap_malloc(unsigned long size) { (void)size; return 0; }")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # other sources take the place of the usual ones in a cache
    monkeypatch.setattr(native, "_SOURCES", [*native._SOURCES, source])
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-Wl,--wrap=malloc"))
    with pytest.raises(MemoryError, match="not enough memory to work in"):
        quantize_to_dense(torch.randn(2, 7), 2)
    with pytest.raises(MemoryError):
        repack(torch.zeros(2, 3, dtype=torch.uint8), 2, 7)
    with pytest.raises(MemoryError):
        block_codes(torch.zeros(3, 4, dtype=torch.uint8), torch.ones(3), 8, (3, 4), kept=True)
    if native.native_library().multiply is not None:
        weight, sums = torch.zeros(16 * 8, dtype=torch.int8), torch.zeros(3, 3, dtype=torch.int32)
        with pytest.raises(MemoryError):
            int_mm(torch.ones(3, 4, dtype=torch.int8), weight, 2, sums)


def test_without_a_compiler_there_is_no_library(no_compiler):
    assert native.native_library() is None


@all_bits
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_without_a_compiler_gives_the_same_bits(no_compiler, monkeypatch, bits, dtype):
    _, dense, scale = random_packed(6, 8 * 9, bits)
    plain = decode_weight(dense, scale, bits, (6, 8, 3, 3), dtype)
    monkeypatch.undo()
    native.native_library.cache_clear()
    assert native.native_library() is not None
    assert same_bits(decode_weight(dense, scale, bits, (6, 8, 3, 3), dtype), plain)


@all_bits
def test_quantizing_without_a_compiler_is_the_reference(no_compiler, bits):
    torch.manual_seed(3)
    weight = torch.randn(5, 301)
    dense, scale = quantize_to_dense(weight, bits)
    codes, expected_scale = quantize_rows(weight, bits)
    assert dense.shape == (5, dense_width(301, bits))
    assert torch.equal(dense, pack_dense(codes, bits))
    assert torch.equal(scale, expected_scale)


def test_a_compiler_that_fails_is_like_none(fresh_library, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "/bin/false")
    assert native.native_library() is None
    assert list(tmp_path.rglob("*.so")) == []


class Longer(ctypes.Structure):
    _fields_ = [*DecodeArguments._fields_, ("more", ctypes.c_int64)]


def test_a_library_with_other_arguments_is_refused(fresh_library, monkeypatch, caplog):
    monkeypatch.setitem(native.ARGUMENTS, "decode", Longer)
    assert native.native_library() is None
    assert (
        f"the loop decode expects {ctypes.sizeof(DecodeArguments)} bytes, not {ctypes.sizeof(Longer)}" in caplog.text
    )


@all_bits
def test_a_library_of_another_dense_form_is_refused(fresh_library, monkeypatch, caplog, bits):
    form = native.DENSE_FORMS[bits]
    monkeypatch.setitem(native.DENSE_FORMS, bits, replace(form, word_bits=16 if form.word_bits < 16 else 8))
    assert native.native_library() is None
    assert f"codes of {bits} bits take" in caplog.text


def test_a_missing_library_is_told_once_in_the_compilers_words(fresh_library, monkeypatch, tmp_path, caplog):
    script = tmp_path / "cc"
    script.write_text("#!/bin/sh\necho 'fatal error: all is lost' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "which", lambda *_, **__: str(script))
    for _ in range(3):
        assert native.native_library() is None
    (record,) = [record for record in caplog.records if record.name.startswith("diffusers_bitsfusion")]
    assert record.levelname == "WARNING"
    assert "cc says: fatal error: all is lost" in record.getMessage()


def test_without_a_cache_the_library_is_built_for_the_process(quick_build, monkeypatch, tmp_path):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(native.Path, "home", nowhere)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert native.native_library() is not None
    assert list(tmp_path.iterdir()) == []


def test_a_cut_library_is_not_loaded_but_built_anew(quick_build, monkeypatch, tmp_path, run_python):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.native_library() is not None
    (library,) = tmp_path.rglob("*.so")
    content = library.read_bytes()
    library.unlink()  # which this process has loaded
    library.write_bytes(content[:5000])
    # In a process of its own, which a damaged library would end.
    code = (
        "import os, sys\n"
        "os.environ['XDG_CACHE_HOME'] = sys.argv[1]\n"
        "from diffusers_bitsfusion.native import library\n"
        "library._FLAGS = (*library._FLAGS, '-O1')\n"
        "print(library.native_library() is not None)"
    )
    process = run_python(code, tmp_path)
    assert process.stdout == "True\n", process.stderr
    (library,) = tmp_path.rglob("*.so")
    assert len(library.read_bytes()) > 5000


def test_the_library_is_built_once_and_then_found(quick_build, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.native_library() is not None
    (built,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert built.suffix == ".so"
    stamp = built.stat().st_mtime_ns
    native.native_library.cache_clear()
    assert native.native_library() is not None
    assert [path for path in Path(tmp_path).rglob("*") if path.is_file()] == [built]
    assert built.stat().st_mtime_ns == stamp
