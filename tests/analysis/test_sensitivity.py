"""The full analysis: that it measures what it says, and that kills, processes and repeats do not change it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fresh_process import run_together

from diffusers_bitsfusion.analysis import sensitivity, single_layer
from diffusers_bitsfusion.analysis.layer_cost import round_weight
from diffusers_bitsfusion.analysis.recording import Reference, record
from diffusers_bitsfusion.analysis.results import Analysis
from diffusers_bitsfusion.analysis.single_layer import trained_weight
from diffusers_bitsfusion.analysis.study import Study
from diffusers_bitsfusion.codec.scales import quantize_rows
from diffusers_bitsfusion.evaluation import Clip, clip_score, generate_images

from .conftest import CAPTIONS, DEAD, SETTINGS

pytest.importorskip("torchmetrics")
pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = "up_blocks.0.resnets.1.conv2"


def measured(analysis: Analysis) -> dict:
    """All that must not depend on how the work was done."""
    return {
        item: {name: value for name, value in metrics.items() if name != "seconds"}
        for item, metrics in analysis.records.items()
    }


def test_every_layer_at_every_width_has_every_metric(full, small_pipe):
    special = ("conv_in", "conv_out", "time_emb")
    layers = [
        name
        for name, module in small_pipe.unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and not any(part in name for part in special)
    ]
    assert list(full.records) == [(name, bits) for name in layers for bits in (1, 2, 3)]
    assert full.header.metrics == ("mse", "psnr", "ssim", "clip_drop")
    assert full.header.settings["prompts"] == CAPTIONS and full.header.settings["steps"] == 2


@pytest.mark.parametrize("bits", [1, 3])
def test_what_is_measured_is_the_distance_of_images_sampled_with_the_layer_rounded(small_pipe, bits):
    references = generate_images(small_pipe, CAPTIONS, SETTINGS.sampling, progress=False)
    settings = replace(SETTINGS, qat_steps=0)
    study = Study(small_pipe, CAPTIONS, settings, clip=None, reference=Reference(references, []))
    ((item, record),) = single_layer.measure(study, [(LAYER, bits)])
    weight = small_pipe.unet.get_submodule(LAYER).weight
    codes, scale = quantize_rows(weight.flatten(1), bits)
    weight.data = (codes * scale[:, None]).view_as(weight)
    images = generate_images(small_pipe, CAPTIONS, SETTINGS.sampling, progress=False)

    errors = ((images / 255.0 - references / 255.0) ** 2).mean(axis=(1, 2, 3))
    assert item == (LAYER, bits)
    assert record["mse"] == pytest.approx(errors.mean(), rel=1e-4) and errors.mean() > 0
    assert record["psnr"] == pytest.approx(np.mean([-10 * math.log10(error) for error in errors]), rel=1e-4)


def test_the_drop_of_the_clip_score_is_the_references_less_the_layers(small_folder, small_pipe, full):
    clip = Clip.from_pretrained(small_folder / "clip")
    texts = clip.text_features(CAPTIONS)
    reference = record(small_pipe, small_pipe.unet, CAPTIONS, SETTINGS.sampling, SETTINGS.qat_steps, progress=False)
    layer = small_pipe.unet.get_submodule(LAYER)
    layer.weight.data = trained_weight(small_pipe.unet, LAYER, 1, reference.calls, 1, SETTINGS.learning_rate)
    images = generate_images(small_pipe, CAPTIONS, SETTINGS.sampling, progress=False)
    scores = [clip_score(clip.image_features(generated), texts).mean() for generated in (reference.images, images)]
    assert full.records[LAYER, 1]["clip_drop"] == pytest.approx(scores[0] - scores[1], abs=1e-4)


@pytest.mark.parametrize("bits", [1, 2])
def test_training_lessens_the_error_of_the_prediction_and_leaves_the_model_as_it_was(small_pipe, bits):
    unet = small_pipe.unet
    calls = record(small_pipe, unet, CAPTIONS, SETTINGS.sampling, calls=4, progress=False).calls
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    modules = dict(unet.named_modules())
    untrained, trained = (trained_weight(unet, LAYER, bits, calls, steps, 4e-3) for steps in (0, 10))
    assert dict(unet.named_modules()) == modules and not hasattr(unet, "qat_state")
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())

    layer, errors = unet.get_submodule(LAYER), []
    for weight in (untrained, trained):
        layer.weight.data = weight
        with torch.no_grad():
            errors.append(sum(F.mse_loss(call.repeat(unet), call.output).item() for call in calls))
        rows = weight.flatten(1)
        levels = rows / rows.abs().amax(dim=1, keepdim=True) * 2 ** (bits - 1)
        torch.testing.assert_close(levels, levels.round(), atol=1e-5, rtol=0)  # still on the balanced grid
    torch.testing.assert_close(untrained, round_weight(before[f"{LAYER}.weight"], bits))
    assert errors[1] < errors[0]


def test_a_layer_that_gives_nothing_has_no_sensitivity(full):
    for bits in (1, 2, 3):
        assert full.records[DEAD, bits]["mse"] == 0
        assert full.records[DEAD, bits]["psnr"] is None  # infinite
        assert full.records[DEAD, bits]["clip_drop"] == 0


def test_killed_within_a_line_it_goes_on_with_the_next(run_analysis, full, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "BITS", (2,))
    expected = {item: metrics for item, metrics in measured(full).items() if item[1] == 2}
    whole, items = single_layer.generate_images, []

    def dies(*arguments, **options):
        items.append(arguments)
        if len(items) == 6:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(single_layer, "generate_images", dies)
    with pytest.raises(KeyboardInterrupt):
        run_analysis(tmp_path)
    (part,) = (tmp_path / "parts").iterdir()
    assert len(part.read_text().splitlines()) == 5
    part.write_bytes(part.read_bytes() + b'{"run": "0123", "layer": "down_blo')
    with pytest.raises(FileNotFoundError, match="is not finished"):
        Analysis.load(tmp_path)

    assert measured(run_analysis(tmp_path)) == expected
    assert len(items) == 6 + len(expected) - 5
    assert measured(run_analysis(tmp_path)) == expected  # nothing is left to do
    assert len(items) == 6 + len(expected) - 5
    assert measured(Analysis.load(tmp_path)) == expected


COUNTING = """
import runpy, sys
from pathlib import Path
from diffusers_bitsfusion.analysis import sensitivity
measured = []
append = sensitivity.Journal.append
sensitivity.Journal.append = lambda journal, item, metrics: (measured.append(item), append(journal, item, metrics))
counts, sys.argv = Path(sys.argv[1]), sys.argv[1:]
state = sensitivity.process_state()
try:
    runpy.run_module("diffusers_bitsfusion", run_name="__main__")
finally:
    (counts / str(state.process_index)).write_text(str(len(measured)))
"""


def test_two_processes_share_the_work_and_find_what_one_finds(small_folder, full, tmp_path):
    (counts := tmp_path / "counts").mkdir()
    options = {"--steps": 2, "--qat-steps": 1, "--batch-size": 2, "--num-images": 3}
    command = ["analyze", small_folder, "--out", tmp_path / "out"]
    command += [part for pair in options.items() for part in pair]
    result = run_together(["-c", COUNTING, counts, *command])
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("24 layers") == 1  # one process speaks
    assert [int((counts / process).read_text()) for process in "01"] == [36, 36]
    assert measured(Analysis.load(tmp_path / "out")) == measured(full)


def test_a_folder_of_other_settings_or_another_model_is_refused(run_analysis, tmp_path):
    run_analysis(tmp_path, method="weight")
    with pytest.raises(ValueError, match=r"another analysis \(other method, metrics, batch_size, calls"):
        run_analysis(tmp_path, method="output")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["run"], manifest["model"]["fingerprint"] = "other", "f" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"another analysis \(other model\)"):
        run_analysis(tmp_path, method="weight")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        run_analysis(tmp_path, method="weight")


def test_what_cannot_be_done_is_said_at_once(run_analysis, tmp_path):
    with pytest.raises(ValueError, match="method must be one of full, calibrated, prediction"):
        run_analysis(tmp_path, method="best")
    with pytest.raises(ValueError, match="there are no prompts"):
        run_analysis(tmp_path, captions=[])
    with pytest.raises(ValueError, match="qat_steps is -1"):
        replace(SETTINGS, qat_steps=-1)
    assert not any(tmp_path.iterdir())
