"""Libraries that a wheel brings: one is taken without a compiler, if it is whole and made of the sources beside it."""

from __future__ import annotations

import shutil

import pytest
import torch

from diffusers_bitsfusion.codec.radix import pack_dense
from diffusers_bitsfusion.native import build, targets
from diffusers_bitsfusion.native import library as native
from diffusers_bitsfusion.native.arguments import DecodeArguments
from diffusers_bitsfusion.native.compiler import BuildError, compilers
from diffusers_bitsfusion.ops.decode import decode

pytestmark = pytest.mark.skipif(not compilers() or not targets.targets(), reason="needs a compiler and targets")


@pytest.fixture(scope="module")
def prebuilt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prebuilt")
    with pytest.MonkeyPatch.context() as patched:
        # Fully optimised, compiling takes four times as long.
        patched.setattr(build, "COMMON_FLAGS", (*build.COMMON_FLAGS, "-O1"))
        assert build.main([str(folder)]) == 0
    return folder


@pytest.fixture
def brought(prebuilt, tmp_path, fresh_library, monkeypatch):
    """The folder of a package that brings the libraries, on a machine without a compiler."""
    folder = shutil.copytree(prebuilt, tmp_path / "brought")
    monkeypatch.setattr(targets, "PREBUILT", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    return folder


def decodes_rightly():
    codes = torch.randint(-2, 3, (5, 301), dtype=torch.int8)
    return torch.equal(decode(pack_dense(codes, 2), torch.ones(5), 2, 301, torch.empty(5, 301)), codes.float())


def test_there_is_one_for_each_target(prebuilt):
    assert len(list(prebuilt.iterdir())) == len(targets.targets())
    assert all(targets.prebuilt_library(prebuilt, target) is not None for target in targets.targets())


def test_one_is_taken_without_a_compiler(brought, tmp_path):
    assert native.native_library() is not None
    assert decodes_rightly()
    assert not (tmp_path / "cache").exists()


def test_every_target_that_this_processor_has_decodes_rightly(brought):
    names = list(targets.targets())
    best = native._loaded(targets.prebuilt_library(brought, names[0])).bitsfusion_target()
    for name in names[: best + 1]:
        library = native._bound(native._loaded(targets.prebuilt_library(brought, name)))
        out = torch.empty(1, 5, dtype=torch.int8)
        codes = torch.tensor([[-1, 0, 1, 1, -1]], dtype=torch.int8)
        dense, scale = pack_dense(codes, 1), torch.ones(1)
        pointers = {"dense": dense.data_ptr(), "scale": scale.data_ptr(), "out": out.data_ptr()}
        library.decode(1, 5, DecodeArguments(**pointers, columns=5, row_bytes_in=1, bits=1, kind=3))
        assert torch.equal(out, codes)


@pytest.mark.parametrize("damage", ["cut", "removed", "of other sources"])
def test_another_is_not_taken(brought, damage, monkeypatch, caplog):
    for library in brought.iterdir():
        if damage == "cut":
            library.write_bytes(library.read_bytes()[:5000])
        elif damage == "removed":
            library.unlink()
    if damage == "of other sources":
        monkeypatch.setattr(native, "_SOURCES", native._SOURCES[1:])
    assert native.native_library() is None
    assert "there is no C compiler" in caplog.text


def test_a_kind_of_processor_without_targets_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(targets.platform, "machine", lambda: "riscv64")
    with pytest.raises(BuildError, match="no targets for this kind of processor"):
        build.build_all(tmp_path)
    assert build.main([str(tmp_path)]) == 1
    assert "no targets" in capsys.readouterr().err
