"""A disk that becomes full while a file grows: the error names it, and what was written goes on."""

from __future__ import annotations

import re

import pytest
from helpers import files_no_larger_than

from diffusers_bitsfusion.analysis.header import Header, LayerCost
from diffusers_bitsfusion.analysis.journal import Journal, finish, open_journal, read_records
from diffusers_bitsfusion.training.loop import _LossLog
from diffusers_bitsfusion.utils.files import write_atomically


def message(file) -> str:
    return rf"^Could not write {re.escape(str(file))}: .*File too large. What was there before is kept.*room\.$"


def test_an_analysis_keeps_its_lines_and_goes_on(tmp_path):
    cost = LayerCost((8, 8), tuple(range(8, 15)), tuple(1.0 / n for n in range(1, 8)))
    model = {"class": "UNet2DConditionModel", "fingerprint": "0" * 64}
    header = Header("full", ("mse",), (1, 2, 3), model, {"a": cost}, 0.0, 64, {"seed": 1}, {}, "r")
    open_journal(tmp_path, header)
    journal = Journal(tmp_path, header, 0)
    file = tmp_path / "parts" / "0000.jsonl"
    journal.append(header.items[0], {"mse": 0.5})
    with files_no_larger_than(file.stat().st_size + 20):
        with pytest.raises(OSError, match=message(file)):
            journal.append(header.items[1], {"mse": 0.25})
        journal.close()
    assert read_records(tmp_path, header) == {header.items[0]: {"mse": 0.5}}
    journal = Journal(tmp_path, header, 0)
    for number, item in enumerate(header.items[1:], start=2):
        journal.append(item, {"mse": 0.5**number})
    journal.close()
    assert [metrics["mse"] for metrics in finish(tmp_path, header).records.values()] == [0.5, 0.25, 0.125]


def test_a_log_of_losses_and_a_file_name_themselves(tmp_path):
    log = _LossLog(tmp_path / "losses.jsonl", 0)
    log.write(1, {"loss": 0.5})
    before = log.path.read_bytes()
    with files_no_larger_than(len(before) + 5):
        with pytest.raises(OSError, match=message(log.path)):
            log.write(2, {"loss": 0.25})
        with pytest.raises(OSError, match=message(tmp_path / "file")):
            write_atomically(tmp_path / "file", b"x" * 100)
    assert [file.name for file in tmp_path.iterdir()] == ["losses.jsonl"]
    _LossLog(log.path, 1)  # A continued run drops the line that was cut.
    assert log.path.read_bytes() == before
