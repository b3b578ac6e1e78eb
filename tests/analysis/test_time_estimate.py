"""The time of an analysis, estimated from a trial and counted by a clock that ticks with every call of the UNet."""

from __future__ import annotations

import pytest
from diffusers import UNet2DConditionModel
from torch.nn.modules.module import register_module_forward_pre_hook

from diffusers_bitsfusion.analysis import sensitivity
from diffusers_bitsfusion.analysis import time_estimate as of_analysis
from diffusers_bitsfusion.calibration import time_estimate as of_sampling

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", ["prediction", "calibrated"])
def test_calls_are_estimated_to_the_last_one_before_the_work(run_analysis, monkeypatch, capsys, method):
    calls, estimated, before = [], [], []
    for module in (of_analysis, of_sampling):
        monkeypatch.setattr(module, "now", lambda _: float(len(calls)))

    def estimate(*arguments):
        estimated.append(of_analysis.estimate_seconds(*arguments))
        before.append(len(calls))
        return estimated[0]

    monkeypatch.setattr(sensitivity, "estimate_seconds", estimate)
    hook = register_module_forward_pre_hook(
        lambda module, _: calls.append(module) if isinstance(module, UNet2DConditionModel) else None
    )
    try:
        run_analysis(method=method, progress=True)
    finally:
        hook.remove()
    assert estimated == [len(calls) - before[0]]
    said = capsys.readouterr().err
    assert said.index("This analysis takes") < said.index("packing layers")


def test_an_analysis_that_goes_on_gives_no_estimate(run_analysis, tmp_path, capsys):
    for told in (True, False):
        run_analysis(tmp_path / "out", method="weight", progress=True)
        assert ("This analysis takes a few seconds." in capsys.readouterr().err) == told
