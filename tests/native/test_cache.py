"""The folder that keeps the compiled library, with a stand-in for the compiler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffusers_bitsfusion.native import cache
from diffusers_bitsfusion.native.cache import content_digest, is_whole, kept_library

PACKAGE = Path(cache.__file__).parent.parent

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has neither modes nor owners of this kind")

# A process that builds into the cache of its environment, and says so; light, since it imports `native` alone.
BUILDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from native.cache import kept_library

def build(path):
    path.write_bytes(b"library")
    print("building", flush=True)
    time.sleep(float(sys.argv[2]))

with kept_library("sources", "machine", build) as path:
    print(path.read_bytes(), flush=True)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "diffusers_bitsfusion"


class Compiler:
    """Writes a library, and counts."""

    def __init__(self, content=b"library"):
        self.content, self.calls, self.places = content, 0, []

    def __call__(self, path):
        self.calls += 1
        self.places.append(path)
        path.write_bytes(self.content)


@contextmanager
def umask(mode):
    before = os.umask(mode)
    try:
        yield
    finally:
        os.umask(before)


def keep(compiler, sources="sources", machine="machine"):
    """The kept library's path and content."""
    with kept_library(sources, machine, compiler) as path:
        return path, path.read_bytes()


def start_builder(folder, seconds):
    environment = os.environ | {"XDG_CACHE_HOME": str(folder.parent)}
    command = [sys.executable, "-c", BUILDER, str(PACKAGE), str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_library_is_built_once(folder):
    compiler = Compiler()
    assert keep(compiler) == keep(compiler)
    assert compiler.calls == 1
    assert [path.name for path in folder.iterdir()] == [keep(compiler)[0].name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"Library"),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    ],
    ids=["cut", "empty", "changed", "longer"],
)
def test_a_damaged_library_is_built_anew(folder, damage):
    compiler = Compiler()
    path, content = keep(compiler)
    damage(path)
    assert keep(compiler) == (path, content)
    assert compiler.calls == 2
    assert is_whole(path)


def test_libraries_of_other_versions_and_leftovers_are_removed(folder):
    keep(Compiler(b"old"), sources="older")
    (folder / "native-0123456789abcdef.so").write_bytes(b"of version 0.1")
    (folder / "tmpabcd").mkdir()
    (folder / "build-abcd").mkdir()
    (folder / "build-abcd" / "native.so").write_bytes(b"half")
    path, _ = keep(Compiler())
    assert list(folder.iterdir()) == [path]


def test_a_library_for_another_machine_stays_beside_one_of_the_same_sources(folder):
    first, _ = keep(Compiler(b"elsewhere"), machine="another")
    second, _ = keep(Compiler())
    assert sorted(folder.iterdir()) == sorted([first, second])


@posix
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_the_folder_is_the_users_alone(folder, mask):
    with umask(mask):
        path, _ = keep(Compiler())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o022 == 0


@posix
def test_a_folder_that_others_may_only_read_is_closed_to_them(folder):
    folder.mkdir(mode=0o755)
    path, _ = keep(Compiler())
    assert path.parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700


@posix
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
def test_nothing_is_taken_from_a_folder_that_others_may_write(folder, mode):
    path, _ = keep(Compiler(b"planted"))
    folder.chmod(mode)
    compiler = Compiler()
    for _ in range(2):
        private, content = keep(compiler)
        assert content == b"library"
        assert folder not in private.parents
        assert not private.exists() and not private.parent.exists()  # removed after use
    assert path.read_bytes() == b"planted"


@posix
def test_nothing_is_taken_from_a_folder_of_another_user(folder, monkeypatch):
    path, _ = keep(Compiler(b"planted"))
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert keep(Compiler())[1] == b"library"
    assert path.read_bytes() == b"planted"


@posix
def test_a_private_build_is_in_a_folder_of_the_users_alone(tmp_path, monkeypatch):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    modes = []

    def compiler(path):
        modes.append(path.parent.stat().st_mode & 0o777)
        path.write_bytes(b"library")

    with umask(0):
        assert keep(compiler)[1] == b"library"
    assert modes == [0o700]


def test_a_relative_cache_folder_is_ignored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    path, _ = keep(Compiler())
    assert path.parent == tmp_path / "home" / ".cache" / "diffusers_bitsfusion"
    assert not (tmp_path / "relative").exists()


def test_a_build_that_fails_leaves_nothing(folder):
    def failing(path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        keep(failing)
    assert list(folder.iterdir()) == []


@posix
def test_a_killed_build_leaves_nothing_for_good(folder):
    process = start_builder(folder, 600)
    assert process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.name.startswith("build-") for path in folder.iterdir()] == [True]
    path, _ = keep(Compiler())
    assert list(folder.iterdir()) == [path]


@posix
def test_processes_that_build_at_once_build_once(folder):
    processes = [start_builder(folder, 1) for _ in range(5)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert sum("building" in text for text in said) == 1
    assert all(text.endswith("b'library'\n") for text in said)
    assert len(list(folder.iterdir())) == 1


@posix
def test_who_waits_too_long_builds_beside_the_other(folder, monkeypatch):
    monkeypatch.setattr(cache, "_PATIENCE", 0.2)
    process = start_builder(folder, 20)
    assert process.stdout.readline() == "building\n"
    start = time.monotonic()
    path, _ = keep(Compiler())
    assert process.poll() is None and time.monotonic() - start < 19
    assert path.read_bytes() == b"library" and len(list(folder.iterdir())) == 2  # the other's work is left alone
    process.kill()
    process.communicate()


@posix
def test_a_build_under_way_is_no_leftover(folder):
    other = folder / "build-abcd"
    other.mkdir(mode=0o700, parents=True)
    (other / "native.so").write_bytes(b"half")
    folder.chmod(0o700)
    with cache._locked(other, 0):  # as a process does that has waited too long for the folder's lock
        path, _ = keep(Compiler())
        assert (other / "native.so").read_bytes() == b"half"
    path.unlink()
    path, _ = keep(Compiler())
    assert list(folder.iterdir()) == [path]


def test_a_name_tells_of_the_content(tmp_path):
    file = tmp_path / "native.so"
    file.write_bytes(b"library")
    named = file.replace(cache.with_digest(file, file))
    assert is_whole(named) and content_digest(named) in named.name
    named.write_bytes(b"librarY")
    assert not is_whole(named)
