"""Files of analyses that are damaged, incomplete or of something else."""

from __future__ import annotations

import json

import pytest

from diffusers_bitsfusion.analysis.allocate import allocate
from diffusers_bitsfusion.analysis.journal import Journal, finish, open_journal, read_records
from diffusers_bitsfusion.analysis.results import Analysis

LAYERS = {"a": (400, (0.4, 0.2, 0.1)), "b.c": (80, (0.3, 0.2, 0.0))}


@pytest.fixture
def analysis(make_analysis):
    return make_analysis(LAYERS)


@pytest.fixture
def load(analysis, tmp_path):
    """Loads the analysis after its lines were changed."""

    def load(change) -> Analysis:
        lines = [json.loads(line) for line in analysis.to_text().splitlines()]
        path = tmp_path / "analysis.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in change(lines)))
        return Analysis.load(path)

    return load


def test_what_is_written_is_read(load, analysis):
    assert load(lambda lines: lines) == analysis
    assert load(lambda lines: [lines[0], *reversed(lines[1:])]) == analysis
    assert analysis.sensitivity(2) == {"a": 0.2, "b.c": 0.2} and analysis.sizes == {"a": 400, "b.c": 80}


def test_another_metric_is_the_sensitivity_psnr_as_its_mse(full):
    by_psnr = full.by("psnr")
    for bits in full.header.bits:
        assert full.by("mse").sensitivity(bits) == full.sensitivity(bits)
        for name, sensitivity in by_psnr.sensitivity(bits).items():
            psnr = full.records[name, bits]["psnr"]
            assert sensitivity == (0 if psnr is None else pytest.approx(10 ** (-psnr / 10)))
    assert by_psnr.records == full.records and "by psnr" in allocate(by_psnr, max_bytes=10**6).source
    for metric in ("ssim", "lpips"):
        with pytest.raises(ValueError, match=f"metric must be one of mse, psnr, clip_drop for .*{metric}"):
            full.by(metric)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:-1], "lacks 1 of 6 lines: b.c at 3 bits"),
        (lambda x: [x[0]], "lacks 6 of 6 lines: a at 1 bits, .* and 1 more"),
        (lambda x: [*x, x[2]], "line 8: a at 2 bits is there twice"),
        (lambda x: [*x[:3], x[3] | {"run": "other"}, *x[4:]], "line 4 is not of this analysis, but of another model"),
        (lambda x: [*x[:-1], x[-1] | {"layer": "d"}], "line 7: the analysis has no layer 'd'"),
        (lambda x: [*x[:-1], x[-1] | {"bits": 4}], "no layer 'b.c' at 4 bits"),
        (lambda x: [*x[:-1], {k: v for k, v in x[-1].items() if k != "mse"}], "line 7 lacks mse"),
        (lambda x: [*x[:-1], x[-1] | {"mse": None}], "line 7: mse is None, not a number"),
        (lambda x: [*x[:-1], x[-1] | {"mse": float("nan")}], "line 7: mse is nan, not a number"),
        (lambda x: [*x[:-1], '{"run": "r", "lay'], "line 7 is damaged"),
        (lambda x: [*x[:-1], "7"], "line 7 is not of this analysis"),
        (lambda x: x[1:], "is not an analysis"),
        (lambda x: [], "line 1 is damaged"),
        (
            lambda x: [{k: v for k, v in x[0].items() if k != "layers"}, *x[1:]],
            "The header of .* is damaged: 'layers'",
        ),
        (lambda x: [x[0] | {"more": 2}, *x[1:]], "The header of .* is damaged"),
        (lambda x: [x[0] | {"version": 2}, *x[1:]], "has version 2, newer than"),
    ],
)
def test_a_damaged_file_is_refused_saying_where(load, change, message):
    with pytest.raises(ValueError, match=message):
        load(change)


def test_a_folder_without_a_finished_analysis_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not finished, or there is none"):
        Analysis.load(tmp_path)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": (400,)}, "the model lacks b.c"),
        ({"a": (400,), "b.c": (80,), "d": (1,)}, "the model also has d"),
        ({"a": (200, 2), "b.c": (80,)}, "the model has in other shapes a"),
    ],
)
def test_a_model_of_another_architecture_is_refused(analysis, shapes, message):
    with pytest.raises(ValueError, match=f"analysis is of another model: {message}"):
        analysis.check_model(shapes, "the model")
    analysis.check_model(analysis.shapes, "the model")


def test_lines_of_several_processes_and_runs_are_merged(analysis, tmp_path):
    header = analysis.header
    open_journal(tmp_path, header)
    items = list(analysis.records.items())
    for run, share in enumerate((items[:2], items[2:4], items[4:])):
        journal = Journal(tmp_path, header, process=run % 2)
        for item, metrics in share:
            journal.append(item, metrics)
        journal.close()
    assert read_records(tmp_path, header) == analysis.records
    assert finish(tmp_path, header) == analysis == Analysis.load(tmp_path) == finish(tmp_path, header)
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize(
    "torn", [b'{"run": "r", "la', b'{"run": "r", "layer": "a", "bits": 3, "mse": 1.0}', b"\x80\n"]
)
def test_a_last_line_cut_short_is_dropped_and_another_damaged_one_refused(analysis, tmp_path, torn):
    header, items = analysis.header, list(analysis.records.items())
    open_journal(tmp_path, header)
    for item, metrics in items[:2]:
        journal = Journal(tmp_path, header, process=0)
        journal.append(item, metrics)
        journal.close()
        part = tmp_path / "parts" / "0000.jsonl"
        part.write_bytes(part.read_bytes() + torn)
    assert read_records(tmp_path, header) == dict(items[:2])
    Journal(tmp_path, header, process=0).close()
    good = part.read_bytes()
    assert len(good.splitlines()) == 2
    part.write_bytes(b"{\n" + good)
    with pytest.raises(ValueError, match=r"0000\.jsonl, line 1 is damaged"):
        read_records(tmp_path, header)
