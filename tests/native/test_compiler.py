"""Which compiler is taken, and what is said where none can."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import sys

import pytest

from diffusers_bitsfusion.native import compiler
from diffusers_bitsfusion.native.compiler import COMMON_FLAGS, BuildError, build, compilers

pytestmark = pytest.mark.skipif(os.name == "nt" or not compilers(), reason="needs a C compiler")

REAL = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "seven.c"
    file.write_text("int seven(void) { return 7; }")
    return file


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def built(source, tmp_path):
    library = tmp_path / "library.so"
    build([source], COMMON_FLAGS, library)
    return ctypes.CDLL(str(library)).seven()


def test_the_variable_names_the_compiler_with_arguments(source, tmp_path, monkeypatch):
    wrapper = script(tmp_path / "a wrapper", f'echo "$@" > {shlex.quote(str(tmp_path / "seen"))}\nexec "$@"')
    monkeypatch.setenv("CC", f"{shlex.quote(str(wrapper))} {REAL} -DEXTRA")
    assert built(source, tmp_path) == 7
    seen = (tmp_path / "seen").read_text()
    assert seen.startswith(f"{REAL} -DEXTRA ") and "seven.c" in seen


def test_the_next_compiler_is_tried_where_one_is_broken(source, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder / "cc", "echo broken >&2; exit 1")
    script(folder / "gcc", "exit 0")  # and writes nothing
    (folder / "clang").symlink_to(REAL)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert [os.path.basename(command[0]) for command in compilers()] == ["cc", "gcc", "clang"]
    assert built(source, tmp_path) == 7


@pytest.mark.parametrize("named", ["", "'", "   ", "no-such-compiler"])
def test_what_names_no_compiler_is_passed_over(named, source, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", named)
    assert built(source, tmp_path) == 7


def test_the_failure_gives_the_words_of_every_compiler_in_one_line(source, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder / "cc", "echo 'In file included' >&2; echo 'fatal error: stdint.h not found' >&2; exit 1")
    script(folder / "gcc", "exit 3")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BuildError) as refused:
        build([source], COMMON_FLAGS, tmp_path / "library.so")
    assert str(refused.value) == ("cc says: fatal error: stdint.h not found; gcc says: nothing, with exit status 3")


def test_a_compiler_that_hangs_is_given_up(source, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "_TIMEOUT", 0.2)
    monkeypatch.setenv("CC", shlex.join([sys.executable, "-c", "import time; time.sleep(60)"]))
    monkeypatch.setattr(shutil, "which", lambda name: name if name == sys.executable else None)
    with pytest.raises(BuildError, match="timed out"):
        build([source], COMMON_FLAGS, tmp_path / "library.so")
