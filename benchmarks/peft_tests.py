"""PEFT's own tests with packed layers: each model that they build is packed at 8 bits as soon as it is built.

    pip download --no-deps --no-binary :all: peft==0.21.2 && tar xf peft-0.21.2.tar.gz
    python -m benchmarks.peft_tests run peft-0.21.2 --results packed.jsonl [--part 0/40] [FILE ...]
    python -m benchmarks.peft_tests run peft-0.21.2 --results float.jsonl --float --failed-in packed.jsonl
    python -m benchmarks.peft_tests table packed.jsonl float.jsonl

The first command runs the tests, or one part of them by the checksums of their names, and adds a line for each to a
file; tests that have a line already are left out, so that it goes on where it was stopped. The second runs those that
failed on the float layers that the tests were written for. The third counts by tuner, and names what fails on packed
layers alone. Models of the Hub are not fetched: what needs them fails on both sides.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

FILES = ["test_custom_models.py"]

# What the messages of failures have in common, in the order in which they are looked for.
REASONS = {
    "merging refused": "cannot be fused into packed weights",
    "training whole refused": "whose weights are packed",
    "FSDP": "Must flatten tensors with uniform dtype",
}
COLUMNS = ["passed", "skipped", *REASONS, "fails with floats too", "other"]


def pack_children(model: Any) -> None:
    """Replace the Linear and Conv2d layers in `model`, if they are no more than that, unless it is an adapter."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    from diffusers_bitsfusion.codec.rounding import Rounding
    from diffusers_bitsfusion.nn.conversion import pack_weight, packed_from_float, replace_module, why_not_packable

    if isinstance(model, BaseTunerLayer):
        return
    for name, layer in list(model.named_modules()):
        if name and type(layer) in (nn.Linear, nn.Conv2d) and why_not_packable(layer) is None:
            packed = packed_from_float(layer, 8, torch.float32)
            pack_weight(packed, layer.weight, Rounding())
            packed.set_compute("exact", "packed")
            replace_module(model, name, packed)


def pack_what_tests_build() -> None:
    """Let the constructors of all modules that are defined in `tests` pack what they have built."""
    from torch import nn

    def wrap(kind: type[nn.Module]) -> None:
        original = kind.__init__

        @functools.wraps(original)
        def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if type(self) is kind:
                pack_children(self)

        kind.__init__ = construct  # type: ignore[method-assign]

    def init_subclass(kind: type[nn.Module], **kwargs: Any) -> None:
        super(nn.Module, kind).__init_subclass__(**kwargs)
        if kind.__module__.startswith("tests."):
            wrap(kind)

    nn.Module.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment]


class Record:
    """A pytest plugin that chooses the tests and writes a line for each that ran."""

    def __init__(self, path: Path, part: tuple[int, int], names: set[str] | None) -> None:
        self.path, self.part, self.names = path, part, names
        self.done = {line["test"] for line in read(path)} if path.exists() else set()

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        index, parts = self.part

        def is_wanted(item: Any) -> bool:
            in_part = zlib.crc32(item.nodeid.encode()) % parts == index
            return in_part and item.nodeid not in self.done and (self.names is None or item.nodeid in self.names)

        config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
        items[:] = filter(is_wanted, items)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if (report.when != "call" and report.passed) or report.when == "teardown":
            return
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.failed:
            crash = report.longrepr.reprcrash
            line |= {"error": crash.message, "where": f"{crash.path}:{crash.lineno}"}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(arguments: argparse.Namespace) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import pytest

    import diffusers_bitsfusion

    print(diffusers_bitsfusion.__file__)
    sdist = arguments.sdist.resolve()
    (sdist / "tests" / "__init__.py").touch()  # The repository has it, the sdist lacks it.
    if not arguments.float:
        pack_what_tests_build()
    names = None
    if arguments.failed_in:
        names = {line["test"] for line in read(arguments.failed_in) if line["outcome"] == "failed"}
    index, _, parts = arguments.part.partition("/")
    options = ["-q", "--no-header", "--tb=native", "--show-capture=no", "-W", "ignore", "-p", "no:cacheprovider"]
    options += ["-p", "no:xdist", "--noconftest", "-o", "addopts=", "--rootdir", str(sdist)]
    files = [str(sdist / "tests" / name) for name in arguments.files]
    record = Record(arguments.results.resolve(), (int(index), int(parts)), names)
    return int(pytest.main([*options, "-c", str(sdist / "pyproject.toml"), *files], plugins=[record]))


def outcome(line: dict[str, Any], failed_with_floats: set[str]) -> str:
    """Return the column of the table that the line of a test belongs to."""
    if line["outcome"] != "failed":
        return line["outcome"]
    if line["test"] in failed_with_floats:
        return "fails with floats too"
    return next((reason for reason, text in REASONS.items() if text in line["error"]), "other")


def tuner(name: str) -> str:
    """Return the tuner that a test's name has a configuration of."""
    found = re.search(r"[-\[](\w+)Config\b", name)
    return found[1] if found else "several or none"


def print_table(arguments: argparse.Namespace) -> int:
    lines = read(arguments.packed)
    floats = read(arguments.floats) if arguments.floats else []
    failed_with_floats = {line["test"] for line in floats if line["outcome"] == "failed"}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines:
        column = outcome(line, failed_with_floats)
        counts[tuner(line["test"])][column] += 1
        if column == "other":
            print(f"{line['test']}\n    {line['error'].splitlines()[0][:300]}\n    {line['where']}")
    rows = [*sorted(counts.items(), key=lambda row: row[0].lower()), ("all", sum(counts.values(), Counter()))]
    print(f"| tuner | tests | {' | '.join(COLUMNS)} |\n|---|{'---|' * (len(COLUMNS) + 1)}")
    for name, row in rows:
        print(f"| {name} | {row.total()} | {' | '.join(str(row[column] or '') for column in COLUMNS)} |")
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("sdist", type=Path, help="folder of PEFT's unpacked source distribution")
    running.add_argument("files", nargs="*", default=FILES, help="files of its folder `tests`")
    running.add_argument("--results", type=Path, required=True, help="file of a line for each test; lines are added")
    running.add_argument("--part", default="0/1", help="INDEX/PARTS")
    running.add_argument("--failed-in", type=Path, help="results: only what failed there is run")
    running.add_argument("--float", action="store_true", help="leave the layers as they are")
    running.set_defaults(action=run)
    table = commands.add_parser("table")
    table.add_argument("packed", type=Path, help="results with packed layers")
    table.add_argument("floats", type=Path, nargs="?", help="results of what failed there, with float layers")
    table.set_defaults(action=print_table)
    arguments = parser.parse_args()
    raise SystemExit(arguments.action(arguments))


if __name__ == "__main__":
    main()
