"""Suites over one pipeline: what they share, what they find, interrupted and shared out."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fresh_process import run_together
from typer.testing import CliRunner

from diffusers_bitsfusion.cli import app
from diffusers_bitsfusion.evaluation import (
    Prompt,
    Sampling,
    SuiteFiles,
    evaluate,
    evaluate_suites,
    format_report,
    image_sets,
    load_suites,
)
from diffusers_bitsfusion.evaluation.clip import Clip
from diffusers_bitsfusion.evaluation.image_folder import ImageFolder
from diffusers_bitsfusion.evaluation.suites import clip_score, preference, score_file

SAMPLING = Sampling(steps=1, batch_size=3)
PLUG_IN = '''
import numpy as np

def detect(images):
    """A cat where the picture is bright, a dog in every one."""
    bright = [bool(np.asarray(image).mean() > 128) for image in images]
    return [[("cat", 0.95, (0, 0, 8, 8), None)] * light + [("dog", 0.5, (2, 2, 9, 9), None)] for light in bright]

def colors(crops):
    return ["red" if crop.getpixel((0, 0))[0] > 127 else "blue" for crop in crops]

def answer(images, questions):
    return ["yes" if image.getpixel((0, 0))[0] > 127 else "no" for image in images]
'''
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a"},
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "b"},
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "ab"},
    {"tag": "counting", "include": [{"class": "dog", "count": 1}], "exclude": [{"class": "dog", "count": 2}],
     "prompt": "c"},
]  # fmt: skip
TIFA = [
    {"id": name, "caption": caption, "question": "is it red?", "choices": ["yes", "no"], "answer": "yes",
     "element_type": "color"} for name, caption in (("one", "a"), ("two", "b"), ("three", "c"))
]  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch, clip_folder):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "plugged_suites.py").write_text(PLUG_IN)
    monkeypatch.chdir(folder)
    (folder / "geneval.jsonl").write_text("\n".join(json.dumps(line) for line in GENEVAL) + "\n")
    (folder / "questions.json").write_text(json.dumps(TIFA))
    (folder / "texts.json").write_text(json.dumps([{"id": q["id"], "caption": q["caption"]} for q in TIFA]))
    rows = [f"{'abc'[i % 3] * (1 + i)}\t{('Animals', 'People')[i % 2]}" for i in range(7)]
    (folder / "prompts.tsv").write_text("Prompt\tCategory\n" + "\n".join(rows) + "\n")
    return SuiteFiles(
        prompts=str(folder / "prompts.tsv"),
        geneval_prompts=str(folder / "geneval.jsonl"),
        tifa_prompts=str(folder / "texts.json"),
        tifa_questions=str(folder / "questions.json"),
        detector="plugged_suites:detect",
        color_classifier="plugged_suites:colors",
        vqa="plugged_suites:answer",
        sentence_encoder="unused",
        clip=str(clip_folder),
        pickscore=str(clip_folder),
        hpsv2=str(clip_folder),
    )


@pytest.fixture
def run(files, source_folder, one_thread, monkeypatch):
    monkeypatch.setattr("diffusers_bitsfusion.evaluation.suites.answers.load_chooser", lambda path: lambda a, c: a)

    def run(*names, path=source_folder, **options):
        return evaluate_suites(
            path, load_suites(names, files), **({"sampling": SAMPLING, "progress": False} | options)
        )

    return run


ALL = ("geneval", "tifa", "clip", "pickscore", "hpsv2")


def test_all_suites_against_a_reference(run, source_folder, packed_folders, tmp_path):
    report = run(*ALL, path=packed_folders["table"], reference=source_folder, images=tmp_path / "images")
    suites = report["suites"]
    assert list(suites) == list(ALL)
    # Three lists of captions, sampled by two pipelines: the last three suites share theirs.
    assert len(list((tmp_path / "images").glob("*/00000.png"))) == 6
    assert json.loads(json.dumps(report, allow_nan=False)) == report

    tasks = suites["geneval"]["geneval"]
    assert list(tasks) == ["overall", "single_object", "colors", "counting"]
    assert tasks["overall"] == pytest.approx(np.mean([tasks[k] for k in ("single_object", "colors", "counting")]))
    assert tasks["counting"] == 0  # 0.5 is not enough there
    for name, key in (("geneval", "geneval"), ("tifa", "tifa")):
        part = suites[name]
        assert part["difference"][key]["overall"] == pytest.approx(
            part[key]["overall"] - part["reference"][key]["overall"]
        )
    assert {"clip_score", "clip_fid", "cmmd"} <= suites["clip"].keys()
    assert list(suites["hpsv2"]["win_rate"]) == ["overall", "Animals", "People"]
    assert suites["geneval"]["settings"]["detector"] == "plugged_suites:detect"
    assert "not by the benchmark's own detector" in suites["geneval"]["note"]
    table = format_report(report)
    assert "win_rate" in table and "  counting" in table and "plugged_suites:detect" in table


def test_clip_and_preference_are_what_evaluate_and_cosines_say(
    run, files, source_folder, packed_folders, clip_folder, tmp_path
):
    options = {"path": packed_folders["table"], "reference": source_folder, "images": tmp_path}
    suites = run("clip", "pickscore", **options)["suites"]
    prompts = [Prompt("abc"[i % 3] * (1 + i), "x") for i in range(7)]
    expected = evaluate(
        packed_folders["table"], prompts, reference=source_folder, clip=clip_folder, sampling=SAMPLING,
        images=tmp_path, progress=False,
    )  # fmt: skip
    for name in ("clip_score", "clip_fid", "cmmd"):
        assert suites["clip"][name] == pytest.approx(expected[name])
    clip = Clip.from_pretrained(clip_folder)
    texts = clip.text_features([prompt.caption for prompt in prompts]).astype(float)
    cosines = []
    for folder in (packed_folders["table"], source_folder):
        (kept,) = (path for path in tmp_path.glob(f"{folder.name}-*") if path.is_dir())
        images = np.stack(
            [ImageFolder(kept, json.loads((kept / "settings.json").read_text())).load(i) for i in range(7)]
        )
        features = clip.image_features(images).astype(float)
        cosines.append((features * texts).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(texts, axis=1))
    assert suites["pickscore"]["pickscore"] == pytest.approx(100 * cosines[0].mean(), rel=1e-5)
    wins = cosines[0] > cosines[1]
    assert suites["pickscore"]["win_rate"]["overall"] == pytest.approx(wins.mean())
    assert suites["pickscore"]["win_rate"]["Animals"] == pytest.approx(wins[::2].mean())
    low, high = suites["pickscore"]["intervals"]["win_rate"]["overall"]
    assert 0 <= low <= wins.mean() <= high <= 1


def test_a_pipeline_against_itself_wins_half(run, source_folder):
    found = run("hpsv2", reference=source_folder)["suites"]["hpsv2"]
    assert found["win_rate"] == {"overall": 0.5, "Animals": 0.5, "People": 0.5}
    assert found["difference"]["hpsv2"] == 0


def test_published_models_come_with_the_processors_they_were_trained_with():
    prompts = [Prompt("a")]
    assert preference.preference_suite("pickscore", prompts).settings == {
        "model": "yuvalkirstain/PickScore_v1",
        "processors": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    }
    own = preference.preference_suite("hpsv2", prompts, "folder").settings
    assert own == {"model": "folder", "processors": "folder"}


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_run_killed_at_any_picture_goes_on(run, tmp_path, monkeypatch, at):
    whole = run("geneval", "clip", images=tmp_path / "whole")
    save, saved = ImageFolder.save, []

    def dying(self, index, image):
        if len(saved) == at:
            raise Killed
        saved.append(index)
        save(self, index, image)

    monkeypatch.setattr(ImageFolder, "save", dying)
    with pytest.raises(Killed):
        run("geneval", "clip", images=tmp_path / "killed")
    monkeypatch.setattr(ImageFolder, "save", lambda *a: (saved.append(a[1]), save(*a)))
    resumed = run("geneval", "clip", images=tmp_path / "killed")
    assert len(saved) == 11  # every image was sampled once
    assert format_report(resumed) == format_report(whole)


def test_scores_killed_in_a_block_go_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_bitsfusion.evaluation.blocks.BLOCK", 2)
    whole = run("clip", images=tmp_path)
    (records,) = tmp_path.glob("clip-*/records-0.jsonl")
    text = records.read_text()
    records.write_text(text[: len(text) * 2 // 3])  # in the middle of a line
    scored = []
    append = score_file.ScoreFile.append

    def counting(self, indices, *rest):
        scored.extend(indices)
        append(self, indices, *rest)

    monkeypatch.setattr(score_file.ScoreFile, "append", counting)
    assert run("clip", images=tmp_path) == whole
    assert 0 < len(scored) < 7
    assert run("clip", images=tmp_path) == whole and len(scored) < 7


def test_what_is_scored_needs_no_model_a_second_time_and_other_models_score_anew(run, files, tmp_path, monkeypatch):
    first = run("clip", images=tmp_path)
    loads = []
    load = clip_score.ClipScore.load
    monkeypatch.setattr(clip_score.ClipScore, "load", lambda self: loads.append(1) or load(self))
    assert run("clip", images=tmp_path) == first and len(loads) == 1  # to see that it is there
    assert len(list(tmp_path.glob("clip-*"))) == 1


def test_several_guidance_scales_and_some_of_the_prompts(files, run, source_folder, tmp_path):
    report = run("clip", images=tmp_path, guidance_scales=[1.5, 3.0])
    scales = report["suites"]["clip"]["by_guidance_scale"]
    assert list(scales) == ["1.5", "3.0"] and scales["3.0"]["settings"]["guidance_scale"] == 3.0
    assert "guidance scale 3.0" in format_report(report)
    (some,) = load_suites(["geneval"], replace(files, num_images=2))
    assert len(some.captions) == 2
    both = load_suites(["geneval", "clip"], replace(files, num_images=5))
    assert [len(suite.captions) for suite in both] == [4, 5]
    with pytest.raises(ValueError, match="Cannot take 0 of 4 prompts"):
        load_suites(["geneval"], replace(files, num_images=0))


def test_what_is_missing_is_said_before_sampling(run, files, tmp_path):
    with pytest.raises(ValueError, match="The suite pickscore compares with a reference"):
        run("pickscore", path="/nowhere")
    with pytest.raises(ValueError, match="There is no suite 'fid'; choose of geneval, tifa, clip, pickscore, hpsv2"):
        run("fid")
    nothing = SuiteFiles()
    with pytest.raises(ValueError, match=r"evaluation_metadata.jsonl is needed: download it from .*--geneval-prompts"):
        load_suites(["geneval"], nothing)
    with pytest.raises(ValueError, match=r"tifa_v1.0_text_inputs.json is needed: .*--tifa-prompts"):
        load_suites(["tifa"], nothing)
    with pytest.raises(ValueError, match=r"PartiPrompts.tsv is needed: .*--prompts"):
        load_suites(["clip"], nothing)
    with pytest.raises(FileNotFoundError, match=r"no data set me/prompts with the file PartiPrompts.tsv can be read"):
        load_suites(["clip"], SuiteFiles(prompts="me/prompts"))
    suites = load_suites(["clip"], SuiteFiles(prompts=files.prompts, clip="me/clip"))
    with pytest.raises(OSError, match=r"The CLIP, me/clip, cannot be loaded .*https://huggingface.co/me/clip"):
        evaluate_suites("/nowhere", suites)


def command(files, source_folder, *more):
    options = {
        "--prompts": files.prompts, "--geneval-prompts": files.geneval_prompts, "--detector": files.detector,
        "--color-classifier": files.color_classifier, "--clip": files.clip, "--steps": 1, "--batch-size": 2,
    }  # fmt: skip
    return ["evaluate", str(source_folder), *(str(part) for pair in options.items() for part in pair), *map(str, more)]


def test_two_processes_find_what_one_finds(files, source_folder, packed_folders, tmp_path, one_thread):
    suites = command(files, packed_folders["table"], "--suite", "geneval", "--suite", "clip")
    plain = command(files, packed_folders["table"])
    for part in ("--geneval-prompts", "--detector", "--color-classifier"):
        del plain[plain.index(part) : plain.index(part) + 2]
    for number, arguments in enumerate((suites, plain)):
        folders = [tmp_path / f"{number}-{processes}" for processes in (1, 2)]
        alone, shared = (
            [*arguments, "--reference", source_folder, "--images", folder, "--json", folder / "report.json"]
            for folder in folders
        )
        result = CliRunner().invoke(app, [str(part) for part in alone])
        assert result.exit_code == 0, result.output
        launched = run_together(["-m", "diffusers_bitsfusion", *shared])
        assert launched.returncode == 0, launched.stderr[-3000:]
        for output in (result.stdout, launched.stdout):
            spoken = output.count("no intervals of fewer")
            assert spoken == (2 if "--suite" in arguments else 1)  # one process speaks, of each suite
        reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
        assert reports[0] == reports[1]
    assert len(list((tmp_path / "0-2").glob("clip-*/records-*.jsonl"))) > 0


def test_several_processes_without_a_folder_are_refused(monkeypatch):
    monkeypatch.setattr(image_sets, "process_state", lambda: SimpleNamespace(num_processes=2))
    with (
        pytest.raises(ValueError, match="Several processes need a folder for the images"),
        image_sets.image_root(None),
    ):
        pass


def test_the_command_prints_and_writes_what_the_suites_found(files, source_folder, tmp_path, one_thread):
    out = tmp_path / "report.json"
    more = ["--suite", "clip", "--suite", "geneval", "--num-images", "2", "--dtype", "bfloat16", "--json", out]
    result = CliRunner().invoke(app, command(files, source_folder, *more))
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert list(report["suites"]) == ["clip", "geneval"] and report["suites"]["clip"]["settings"]["images"] == 2
    assert "clip_score" in result.output and "no intervals of fewer" in result.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--suite", "coco"], "There is no suite 'coco'; choose of geneval"),
        (["--suite", "clip", "--lpips"], "--scorer and --lpips are not for suites"),
        (["--suite", "tifa"], "tifa_v1.0_text_inputs.json is needed"),
        (["--suite", "pickscore"], "The suite pickscore compares with a reference"),
        (["--suite", "geneval", "--detector", "nowhere:f"], "The detector 'nowhere:f' cannot be imported"),
        (["--suite", "geneval", "--geneval-prompts", "prompts.tsv"], "prompts.tsv is not GenEval's"),
    ],
)
def test_the_command_says_what_is_wrong(files, source_folder, more, message):
    result = CliRunner().invoke(app, command(files, source_folder, *more))
    assert result.exit_code == 1 and message in result.stderr


MEMORY = """
import os, resource, sys
os.fsync = lambda descriptor: None  # thousands of waits for the disk
from diffusers_bitsfusion.evaluation import Sampling, Prompt, evaluate, evaluate_suites
from diffusers_bitsfusion.evaluation.suites.clip_score import ClipScore
pipeline, clip, folder = sys.argv[1:]
SAMPLING = Sampling(steps=1, guidance_scale=1, batch_size=50, scheduler="DDIMScheduler")
for count in (500, 5000):
    prompts = [Prompt("abcdefgh"[i % 8] * (1 + i % 7)) for i in range(count)]
    evaluate_suites(pipeline, [ClipScore(prompts, clip)], sampling=SAMPLING, images=folder, progress=False)
    evaluate(pipeline, prompts, clip=clip, sampling=SAMPLING, images=folder, progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number_of_pictures(run_python, source_folder, clip_folder, tmp_path):
    # With an environment, though an empty one, no page of its memory is shared with another process.
    result = run_python(MEMORY, source_folder, clip_folder, tmp_path, environment={})
    assert result.returncode == 0, result.stderr[-3000:]
    few, many = map(int, result.stdout.split())
    assert many < 1.02 * few
