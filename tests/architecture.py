"""The rooms of the package and the arrows between them, read from the imports; run as a script, it prints the figures.

A room is a folder of the package, or a file at its top. An arrow goes from the room whose file imports to the room
that is imported. docs/ARCHITECTURE.md draws the floors; an arrow that leads to the same floor or a higher one climbs.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "diffusers_bitsfusion"
PAGE = REPOSITORY / "docs" / "ARCHITECTURE.md"

# Rooms of the classes of a config and of what it becomes.
_ROOMS_OF_CONFIGS = ("config", "codec", "packing")

Arrow = tuple[str, str]


def files() -> list[Path]:
    """Return all Python files of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def room_of(parts: tuple[str, ...]) -> str:
    """Return the room of a module, given its dotted name within the package, split."""
    return parts[0] if parts else "__init__"


def arrows() -> dict[Arrow, list[str]]:
    """Return every arrow between two rooms, with the files that draw it."""
    found: dict[Arrow, list[str]] = defaultdict(list)
    for file in files():
        for target in _imported(file):
            source, goal = room_of(_module(file)), room_of(target)
            if source != goal:
                found[source, goal].append(str(file.relative_to(PACKAGE)))
    return dict(found)


def arrows_of_files() -> set[Arrow]:
    """Return every arrow between two files, as dotted names within the package; a folder's name is its `__init__`."""
    found = {(".".join(_module(file)), ".".join(target)) for file in files() for target in _imported(file)}
    return {(source, goal) for source, goal in found if source != goal}


def _module(file: Path) -> tuple[str, ...]:
    here = file.relative_to(PACKAGE).with_suffix("").parts
    return here[:-1] if here[-1] == "__init__" and len(here) > 1 else here


@functools.cache
def _imported(file: Path) -> list[tuple[str, ...]]:
    """Return the modules of this package that a file imports, wherever in the file, as dotted names split."""
    package = file.relative_to(PACKAGE).parent.parts
    targets = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = package[: len(package) - (node.level - 1)]
        elif (node.module or "").split(".")[0] == PACKAGE.name:
            base = ()
        else:
            continue
        named = (*base, *(node.module or "").split(".")) if node.level else tuple((node.module or "").split(".")[1:])
        named = tuple(part for part in named if part)
        # `from . import name` names a module or a name of the package's own __init__.
        targets += [(*named, alias.name) if _is_module((*named, alias.name)) else named for alias in node.names]
    return targets


def _is_module(parts: tuple[str, ...]) -> bool:
    path = PACKAGE.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


def floors() -> dict[str, int]:
    """Return the floor of each room as docs/ARCHITECTURE.md draws it, the ground being 0."""
    drawing = re.search(r"<!-- floors -->\s*```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    if drawing is None:
        raise ValueError(f"{PAGE} has no drawing after <!-- floors -->.")
    rows = [line.split("│")[0].split() for line in drawing[1].splitlines() if line.strip()]
    return {room: floor for floor, row in enumerate(reversed(rows)) for room in row}


def climbing() -> list[Arrow]:
    """Return the arrows that do not lead to a lower floor."""
    floor = floors()
    return [(source, goal) for source, goal in arrows() if floor[source] <= floor[goal]]


def circles(found: Iterable[Arrow]) -> list[list[str]]:
    """Return the groups of two rooms, or files, or more that reach each other by the given arrows."""
    reach: dict[str, set[str]] = defaultdict(set)
    for source, goal in found:
        reach[source].add(goal)
    ends = sorted(reach.keys() | set().union(*reach.values()))
    for middle in ends:
        for source in ends:
            if middle in reach[source]:
                reach[source] |= reach[middle]
    groups = {frozenset([end, *(other for other in reach[end] if end in reach[other])]) for end in ends}
    return [sorted(group) for group in groups if len(group) > 1]


def longest_function() -> tuple[int, str]:
    """Return (lines, name) of the longest function."""
    lengths = []
    for file in files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lengths.append(((node.end_lineno or 0) - node.lineno + 1, f"{file.relative_to(PACKAGE)}:{node.name}"))
    return max(lengths)


def longest_file() -> tuple[int, str]:
    """Return (lines, name) of the longest file."""
    return max(
        (len(file.read_text(encoding="utf-8").splitlines()), str(file.relative_to(PACKAGE))) for file in files()
    )


def stops() -> tuple[list[str], int]:
    """Follow a config from `quantize_model` to the packed layer of a model of one linear layer, while it runs.

    Returns:
        Functions of the package, in the order of their first call, that are called before `PackedWeight.from_float`
        makes the layer, and of whose arguments one is the config or what it becomes: an object of a class of `config`,
        `codec` or `packing`; and the number of all functions of the package that are called before.
    """
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from torch import nn

    from diffusers_bitsfusion import BitsFusionConfig, quantize_model
    from diffusers_bitsfusion.nn.packed import PackedWeight

    class OneLayer(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

    called: dict[str, bool] = {}
    last = PackedWeight.from_float.__func__.__code__

    def follow(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or PACKAGE not in Path(code.co_filename).parents or "<" in code.co_name:
            return
        if code is last:
            sys.setprofile(None)
            return
        name = f"{Path(code.co_filename).relative_to(PACKAGE)}:{code.co_qualname}"
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        called[name] = called.get(name, False) or any(_is_carrier(frame.f_locals.get(name)) for name in arguments)

    def _is_carrier(value: Any) -> bool:
        return type(value).__module__.startswith(tuple(f"{PACKAGE.name}.{room}." for room in _ROOMS_OF_CONFIGS))

    model, config = OneLayer(), BitsFusionConfig(recipe=2)
    sys.setprofile(follow)
    try:
        quantize_model(model, config, progress=False)
    finally:
        sys.setprofile(None)
    return [name for name, carries in called.items() if carries], len(called)


def main() -> None:
    """Print the figures of the structure, and every arrow that climbs."""
    found = arrows()
    rooms = {room for arrow in found for room in arrow}
    print(f"rooms             {len(rooms)}")
    print(f"arrows            {len(found)}")
    print(f"climbing arrows   {len(climbing())}")
    print(f"circles           {len(circles(found))} of rooms, {len(circles(arrows_of_files()))} of files")
    print(f"files at the top  {len([file for file in PACKAGE.iterdir() if file.is_file()])}")
    print("longest function  {} lines, {}".format(*longest_function()))
    print("longest file      {} lines, {}".format(*longest_file()))
    followed, called = stops()
    print(f"stops             {len(followed)} of {called} functions called from quantize_model to the packed layer")
    if "--stops" in sys.argv:
        print("\n".join(followed))
    for source, goal in climbing():
        print(f"{source} -> {goal}: {', '.join(sorted(set(found[source, goal])))}")


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
