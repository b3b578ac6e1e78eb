"""docs/SUPPORT.md: every cell that claims a test names one, and every named test exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TEXT = (REPOSITORY / "docs" / "SUPPORT.md").read_text(encoding="utf-8")
NAMED = dict(re.findall(r"^- \[(\w+)\] `(.+)`$", TEXT, re.MULTILINE))
CLAIMS = TEXT.partition("## PEFT's own tests")[0]
CELLS = [cell.strip() for line in CLAIMS.splitlines() if line.startswith("| ") for cell in line.split("|")[2:-1]]


class Collected:
    """A pytest plugin that keeps the names of what was collected."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def pytest_collection_modifyitems(self, items) -> None:
        for item in items:
            name = f"{item.path.relative_to(REPOSITORY)}::{item.name}"
            self.names |= {name, name.partition("[")[0], name.partition("::")[0]}


@pytest.fixture(scope="module")
def collected() -> set[str]:
    plugin = Collected()
    files = sorted({str(REPOSITORY / name.partition("::")[0]) for name in NAMED.values()})
    pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "-n", "0", *files], plugins=[plugin])
    return plugin.names


def test_every_named_test_exists(collected):
    assert [name for name in NAMED.values() if name not in collected] == []


def test_every_claim_names_a_test_and_every_test_is_claimed():
    claims = [cell for cell in CELLS if cell.startswith(("tested", "tried", "refused"))]
    assert len(claims) > 70 and all(re.search(r"\[\w+\]", cell) for cell in claims)
    used = {key for cell in CELLS for key in re.findall(r"\[(\w+)\]", cell)}
    assert used == NAMED.keys()


def test_every_cell_says_one_of_the_words():
    words = ("tested", "tried", "*untested*", "refused", "**no**", "–", "")
    headings = ("quantized", "any-step", "fp16", "LoRA", "CPU", "CUDA", "MPS", "---")
    assert [cell for cell in CELLS if not cell.startswith((*words[:-1], *headings)) and cell] == []
