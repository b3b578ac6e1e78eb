"""Code blocks of Markdown pages, and running them as a reader would: in order, page by page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from diffusers_bitsfusion.cli import app

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    REPOSITORY / "examples" / "README.md",
    REPOSITORY / "examples" / "shapes" / "README.md",
    REPOSITORY / "examples" / "shapes" / "MODEL_CARD.md",
]
RUN = ("python", "bash")
NEVER_RUN = ("text", "yaml", "json")
NOT_RUN = re.compile(r"<!-- not run: (\S.*) -->")

# Settings that cost minutes, made small, and hardware that a test may not have.
SMALLER = {
    "num_samples=128": "num_samples=2, num_inference_steps=1",
    "tuning_steps=320": "tuning_steps=1",
    "calibration=True": "calibration={'num_samples': 1, 'num_inference_steps': 1}",
    '"an astronaut riding a horse")': '"an astronaut riding a horse", num_inference_steps=2)',
    '.to("cuda")': "",
    "heldout_prompts(600)": "heldout_prompts(2)",
    "num_inference_steps=50": "num_inference_steps=1",
    "--calibrate": "--calibrate --samples 1 --steps 1",
    "bitsfusion evaluate": "bitsfusion evaluate --steps 2",
    "bitsfusion compare": "bitsfusion compare --steps 2",
    "bitsfusion analyze": "bitsfusion analyze --steps 2 --num-images 2 --calls 2",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        where: page and line of its opening fence.
        language: what follows the fence.
        source: its text.
        reason: why it is not run, from the comment on the line before it; None where it has none.
    """

    where: str
    language: str
    source: str
    reason: str | None

    @property
    def runs(self) -> bool:
        return self.language in RUN and self.reason is None


def blocks(text: str, page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page's text in their order.

    Raises:
        ValueError: the last fence is not closed.
    """
    lines = text.splitlines()
    opened = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number
            continue
        before = NOT_RUN.fullmatch(lines[opened - 1]) if opened else None
        source = "\n".join(lines[opened + 1 : number])
        yield Block(f"{page}:{opened + 1}", lines[opened][3:].strip(), source, before and before[1])
        opened = None
    if opened is not None:
        raise ValueError(f"{page}:{opened + 1} opens a code block that nothing closes.")


def page_blocks(page: Path) -> list[Block]:
    return list(blocks(page.read_text(encoding="utf-8"), page.relative_to(REPOSITORY).as_posix()))


def commands(source: str) -> list[list[str]]:
    """The commands of a shell block as words, without comments and with continued lines joined."""
    lines = source.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(found: list[Block]) -> None:
    """Run the blocks of one page in order: Python in one namespace, `bitsfusion` commands in this process.

    Raises:
        RuntimeError: a block fails, or holds a command that cannot be run here; the message names page and line.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in found:
        if not block.runs:
            continue
        source = block.source
        for costly, cheap in SMALLER.items():
            source = source.replace(costly, cheap)
        try:
            if block.language == "python":
                exec(compile(source, block.where, "exec"), namespace)
            else:
                for words in commands(source):
                    _run_command(words)
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"{block.where} fails: {type(error).__name__}: {error}") from error


def _run_command(words: list[str]) -> None:
    if words[0] != "bitsfusion":
        raise ValueError(f"only bitsfusion commands are run, not {words[0]!r}; mark the block with its reason")
    result = CliRunner().invoke(app, words[1:])
    if result.exit_code:
        raise ValueError(f"{shlex.join(words)} ends with {result.exit_code}: {result.output}") from result.exception
