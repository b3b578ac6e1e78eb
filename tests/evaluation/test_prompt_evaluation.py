from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from diffusers_bitsfusion.evaluation import Prompt, Sampling, evaluate, format_report, image_distances

pytest.importorskip("torchmetrics")
SAMPLING = Sampling(steps=2)


def bright(images, specs):
    return [image.mean() > spec["above"] for image, spec in zip(images, specs, strict=True)]


@pytest.fixture(scope="module")
def make(source_folder, clip_folder, one_thread):
    def make(path, prompts, **changes):
        return evaluate(path, prompts, **({"sampling": SAMPLING, "progress": False} | changes))

    return make


def test_everything_against_a_reference(make, source_folder, packed_folders, clip_folder, prompts):
    report = make(packed_folders["table"], prompts, reference=source_folder, scorer=bright, clip=clip_folder)
    assert list(report["compositional"]) == ["overall", "dark", "light"]
    measured = {"compositional", "clip_score", "mse", "psnr", "ssim", "clip_fid", "cmmd"}
    assert measured <= report.keys() and report["mse"] > 0 and report["clip_fid"] > 0
    assert report["intervals"].keys() == measured - {"clip_fid", "cmmd"}
    assert report["difference"]["clip_score"] == pytest.approx(
        report["clip_score"] - report["reference"]["clip_score"]
    )
    overall, categories = report["compositional"]["overall"], [report["compositional"][k] for k in ("dark", "light")]
    assert overall == pytest.approx(np.mean(categories))
    assert report["settings"]["scheduler"] == "PNDMScheduler" and report["settings"]["images"] == 6
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    table = format_report(report)
    assert all(name in table for name in measured) and "  dark" in table


def test_against_itself_nothing_differs(make, source_folder, clip_folder, prompts):
    report = make(source_folder, prompts, reference=source_folder, scorer=bright, clip=clip_folder)
    assert report["mse"] == 0 and report["psnr"] is None and report["intervals"]["psnr"] == [None, None]
    assert report["clip_fid"] == pytest.approx(0, abs=1e-6) and report["cmmd"] == pytest.approx(0, abs=1e-6)
    assert report["difference"]["intervals"]["compositional"]["overall"] == [0, 0]
    assert report["difference"]["intervals"]["clip_score"] == [0, 0]
    assert "inf" in format_report(report)


def test_without_reference_and_with_the_clip_of_the_pipeline(make, source_folder, clip_folder, prompts, tmp_path):
    folder = shutil.copytree(source_folder, tmp_path / "pipeline")
    shutil.copytree(clip_folder, folder / "clip")
    report = make(folder, prompts)
    assert report["settings"]["clip"] == str(folder / "clip")
    assert report.keys() == {"clip_score", "intervals", "settings"}


def test_several_guidance_scales(make, source_folder, prompts):
    report = make(source_folder, prompts, scorer=bright, guidance_scales=[1.5, 3.0, 1.5])
    assert list(report["by_guidance_scale"]) == ["1.5", "3.0"]
    assert report["compositional"] == report["by_guidance_scale"]["1.5"]["compositional"]
    assert report["settings"]["guidance_scale"] == 1.5
    assert "guidance scale 3.0" in format_report(report)


def test_images_are_kept_and_tied_to_what_drew_them(make, source_folder, packed_folders, prompts, tmp_path):
    first = make(source_folder, prompts, scorer=bright, images=tmp_path)
    kept = sorted(tmp_path.glob("*/*.png"))
    times = [file.stat().st_mtime_ns for file in kept]
    assert len(kept) == len(prompts)
    assert make(source_folder, prompts, scorer=bright, images=tmp_path) == first
    make(packed_folders["keep"], prompts, reference=source_folder, images=tmp_path)
    assert [file.stat().st_mtime_ns for file in kept] == times
    assert len(list(tmp_path.glob("*/*.png"))) == 2 * len(prompts)
    make(source_folder, prompts, scorer=bright, images=tmp_path, sampling=replace(SAMPLING, seed=7))
    assert len(list(tmp_path.iterdir())) == 3


def test_what_cannot_be_measured_is_said_before_sampling(make, prompts, monkeypatch):
    nowhere = "/nowhere"  # never read
    with pytest.raises(ValueError, match="There are no prompts"):
        make(nowhere, [], scorer=bright)
    with pytest.raises(ValueError, match="Nothing to measure"):
        make(nowhere, prompts)
    with pytest.raises(ValueError, match="needs a Spec with every prompt; 1 lack it, first 'bare'"):
        make(nowhere, [*prompts, Prompt("bare", "dark")], scorer=bright)
    with pytest.raises(ValueError, match="LPIPS needs a reference"):
        make(nowhere, prompts, scorer=bright, lpips=True)
    monkeypatch.setattr(image_distances, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"diffusers_bitsfusion\[eval\]"):
        make(nowhere, prompts, reference=nowhere)
